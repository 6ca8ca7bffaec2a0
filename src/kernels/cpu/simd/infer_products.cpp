// Products of the inference step in plain loops over a panel's 16 rows, which the compiler turns into vectors. Layouts:
// infer_kernels.h.
#include "kernels/cpu/simd/infer_simd.h"

namespace mm::MM_ISA {

constexpr int n_lane = 16;

void few_f32(float* out, int64_t ldo, const float* w, int64_t k, int64_t panels, const float* x, int64_t ldx, int64_t m,
             const WeightStream& /*stream*/) {
  for (int64_t p = 0; p < panels; p++, w += k * n_lane) {
    for (int64_t r = 0; r < m; r++) {
      float acc[n_lane] = {};
      for (int64_t i = 0; i < k; i++) {
        const float a = x[r * ldx + i];
        for (int l = 0; l < n_lane; l++) acc[l] += a * w[i * n_lane + l];
      }
      for (int l = 0; l < n_lane; l++) out[r * ldo + p * n_lane + l] = acc[l];
    }
  }
}

// One operand row (its first chunk) with one panel.
static inline void dot_bf16(float* acc, const uint16_t* x, const uint16_t* w, int64_t kp) {
  for (int64_t t = 0; t < kp / 32; t++) {
    for (int i = 0; i < 16; i++) {
      const uint16_t* pair = w + t * infer_tile + i * 32;
      const float a0 = bf16_to_f32(x[t * infer_tile + 2 * i]), a1 = bf16_to_f32(x[t * infer_tile + 2 * i + 1]);
      for (int l = 0; l < n_lane; l++) {
        acc[l] += a0 * bf16_to_f32(pair[2 * l]);
        acc[l] += a1 * bf16_to_f32(pair[2 * l + 1]);
      }
    }
  }
}

void few_bf16(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
              const WeightStream& /*stream*/) {
  for (int64_t p = 0; p < panels; p++) {
    for (int64_t r = 0; r < m; r++) {
      float acc[n_lane] = {};
      dot_bf16(acc, x + r * 32, w + p * kp * n_lane, kp);
      for (int l = 0; l < n_lane; l++) out[r * ldo + p * n_lane + l] = acc[l];
    }
  }
}

void few_i8(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
            int64_t m, const WeightStream& /*stream*/) {
  const int64_t panel_bytes = kp / 64 * infer_i8_block;
  for (int64_t p = 0; p < panels; p++, w += panel_bytes) {
    for (int64_t r = 0; r < m; r++) {
      const int8_t* row = x + r * ldx;
      const float* scales = reinterpret_cast<const float*>(row + kp);
      const int32_t* corrections = reinterpret_cast<const int32_t*>(row + kp + kp / 32 * 4);
      float acc[n_lane] = {};
      for (int64_t g = 0; g < kp / 32; g++) {
        const uint8_t* group = w + g / 2 * infer_i8_block + g % 2 * 512;
        const uint16_t* w_scale = reinterpret_cast<const uint16_t*>(w + g / 2 * infer_i8_block + 1024) + g % 2 * n_lane;
        int32_t sum[n_lane];
        for (int l = 0; l < n_lane; l++) sum[l] = corrections[g];
        for (int q = 0; q < 8; q++) {
          for (int l = 0; l < n_lane; l++) {
            for (int j = 0; j < 4; j++)
              sum[l] += static_cast<int32_t>(group[q * 64 + l * 4 + j]) * row[g * 32 + q * 4 + j];
          }
        }
        for (int l = 0; l < n_lane; l++) acc[l] += static_cast<float>(sum[l]) * scales[g] * f16_to_f32(w_scale[l]);
      }
      for (int l = 0; l < n_lane; l++) out[r * ldo + p * n_lane + l] = acc[l];
    }
  }
}

void expand_i8(uint16_t* tiles, const uint8_t* w, int64_t kp) {
  for (int64_t g = 0; g < kp / 32; g++) {
    const uint8_t* group = w + g / 2 * infer_i8_block + g % 2 * 512;
    const uint16_t* w_scale = reinterpret_cast<const uint16_t*>(w + g / 2 * infer_i8_block + 1024) + g % 2 * n_lane;
    float scale[n_lane];
    for (int l = 0; l < n_lane; l++) scale[l] = f16_to_f32(w_scale[l]);
    for (int q = 0; q < 8; q++) {
      for (int l = 0; l < n_lane; l++) {
        for (int j = 0; j < 4; j++) {
          const float x = static_cast<float>(group[q * 64 + l * 4 + j] - 128) * scale[l];
          tiles[g * infer_tile + (2 * q + j / 2) * 32 + 2 * l + j % 2] = f32_to_bf16(x);
        }
      }
    }
  }
}

void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* /*next*/) {
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* row = a + r / 16 * kp * 16 + r % 16 * 32;
    for (int p = 0; p < (b1 != nullptr ? 2 : 1); p++) {
      float acc[n_lane] = {};
      dot_bf16(acc, row, p == 0 ? b0 : b1, kp);
      for (int l = 0; l < n_lane; l++) c[r * 32 + p * n_lane + l] = acc[l];
    }
  }
}

void many_f32(float* c, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0, const float* b1) {
  constexpr int n_row = 8;  // share each load of the weights
  for (int p = 0; p < (b1 != nullptr ? 2 : 1); p++) {
    const float* w = p == 0 ? b0 : b1;
    for (int64_t r0 = 0; r0 < rows; r0 += n_row) {
      const float* row[n_row];
      for (int r = 0; r < n_row; r++) row[r] = a + (r0 + r < rows ? r0 + r : rows - 1) * lda;
      float acc[n_row][n_lane] = {};
      for (int64_t i = 0; i < k; i++) {
        for (int r = 0; r < n_row; r++) {
          for (int l = 0; l < n_lane; l++) acc[r][l] += row[r][i] * w[i * n_lane + l];
        }
      }
      for (int r = 0; r < n_row && r0 + r < rows; r++) {
        for (int l = 0; l < n_lane; l++) c[(r0 + r) * 32 + p * n_lane + l] = acc[r][l];
      }
    }
  }
}

}  // namespace mm::MM_ISA
