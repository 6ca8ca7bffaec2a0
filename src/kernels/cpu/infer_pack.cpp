// Packed weights of the inference step; layouts in infer_kernels.h. Once a load, so plain loops.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "kernels/cpu/infer.h"
#include "kernels/cpu/infer_plan.h"

namespace mm::cpu {

namespace {

constexpr int64_t lanes = infer_panel;

uint16_t to_bf16(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float from_bf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

uint16_t to_f16(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u)  // subnormal: the addition rounds to its grid
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13));
}

float from_f16(uint16_t h) {
  const uint32_t e = h >> 10 & 0x1fu, f = h & 0x3ffu;
  const float a = e == 31  ? (f != 0 ? NAN : INFINITY)
                  : e == 0 ? std::ldexp(static_cast<float>(f), -24)
                           : std::ldexp(static_cast<float>(f | 0x400u), static_cast<int>(e) - 25);
  return (h & 0x8000u) != 0 ? -a : a;
}

// A group of 32 (or what is left of a row) as integers of one scale. The scale is rounded to f16 first, so that the
// integers fit the scale that the product uses. A NaN or an infinity makes the scale one: the row's sums become NaN.
void quantize_group(int8_t* q, const float* x, int64_t n, uint16_t* scale) {
  float top = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(std::abs(x[i]) <= top)) top = std::isnan(top) ? top : std::abs(x[i]);
  }
  *scale = to_f16(top / 127.0f);
  const float s = from_f16(*scale), inv = s > 0 && std::isfinite(s) ? 1.0f / s : 0.0f;
  for (int64_t i = 0; i < n; i++) {
    const float v = std::isfinite(x[i]) ? std::nearbyint(x[i] * inv) : 0.0f;
    q[i] = static_cast<int8_t>(std::clamp(v, -127.0f, 127.0f));
  }
}

void pack_i8(uint8_t* to, const float* w, int64_t n, int64_t k) {
  const int64_t kp = padded_k(k);
  for (int64_t p = 0; p < panels_of(n); p++) {
    for (int64_t b = 0; b < kp / 64; b++, to += infer_i8_block) {
      std::fill_n(to, 1024, uint8_t{128});
      std::fill_n(to + 1024, 64, uint8_t{0});
      for (int64_t g = 0; g < 2; g++) {
        const int64_t k0 = b * 64 + g * 32;
        for (int64_t l = 0; l < lanes && p * lanes + l < n && k0 < k; l++) {
          int8_t q[weight_group];
          uint16_t scale = 0;
          const int64_t m = std::min(weight_group, k - k0);
          quantize_group(q, w + (p * lanes + l) * k + k0, m, &scale);
          for (int64_t i = 0; i < m; i++)
            to[g * 512 + i / 4 * 64 + l * 4 + i % 4] = static_cast<uint8_t>(static_cast<int>(q[i]) + 128);
          std::memcpy(to + 1024 + (g * lanes + l) * 2, &scale, 2);
        }
      }
    }
  }
}

}  // namespace

size_t packed_bytes(WeightFormat format, int64_t n, int64_t k) {
  return static_cast<size_t>(panels_of(n) * panel_bytes(format, k));
}

void pack_matrix(WeightFormat format, void* to, const float* w, int64_t n, int64_t k) {
  if (format == WeightFormat::i8) {
    pack_i8(static_cast<uint8_t*>(to), w, n, k);
    return;
  }
  std::memset(to, 0, packed_bytes(format, n, k));
  for (int64_t r = 0; r < n; r++) {
    char* panel = static_cast<char*>(to) + r / lanes * panel_bytes(format, k);
    const int64_t l = r % lanes;
    for (int64_t i = 0; i < k; i++) {
      if (format == WeightFormat::f32) reinterpret_cast<float*>(panel)[i * lanes + l] = w[r * k + i];
      else reinterpret_cast<uint16_t*>(panel)[i / 2 * 32 + l * 2 + i % 2] = to_bf16(w[r * k + i]);
    }
  }
}

void unpack_rows(const InferMatrix& w, int64_t begin, int64_t end, float* out) {
  for (int64_t r = begin; r < end; r++) {
    const char* panel = static_cast<const char*>(w.data) + r / lanes * panel_bytes(w.format, w.k);
    const int64_t l = r % lanes;
    for (int64_t i = 0; i < w.k; i++) {
      float x = 0;
      if (w.format == WeightFormat::f32) {
        x = reinterpret_cast<const float*>(panel)[i * lanes + l];
      } else if (w.format == WeightFormat::bf16) {
        x = from_bf16(reinterpret_cast<const uint16_t*>(panel)[i / 2 * 32 + l * 2 + i % 2]);
      } else {
        const char* block = panel + i / 64 * infer_i8_block;
        const int64_t g = i % 64 / 32, j = i % 32;
        uint16_t scale = 0;
        std::memcpy(&scale, block + 1024 + (g * lanes + l) * 2, 2);
        const int q = static_cast<uint8_t>(block[g * 512 + j / 4 * 64 + l * 4 + j % 4]) - 128;
        x = static_cast<float>(q) * from_f16(scale);
      }
      *out++ = x;
    }
  }
}

}  // namespace mm::cpu
