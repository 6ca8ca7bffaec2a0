// Attention of a block of query rows over paged keys, fp32: keys go by blocks of 64 counted from key 0 of the sequence,
// with a running maximum and sum a row (Milakov and Gimelshein 2018; Dao et al. 2022). A row's result depends on its
// own keys alone: a block that it sees in part ends for it at its last key, one that it does not see is skipped.
#include "kernels/cpu/simd/infer_simd.h"
#include "kernels/cpu/simd/simd_math.h"

namespace mm::MM_ISA {

static inline void widen(float* y, KvFormat format, const void* base, int64_t at, float scale, int64_t n) {
  switch (format) {
    case KvFormat::f32:
      for (int64_t i = 0; i < n; i++) y[i] = static_cast<const float*>(base)[at + i];
      break;
    case KvFormat::bf16:
      for (int64_t i = 0; i < n; i++) y[i] = bf16_to_f32(static_cast<const uint16_t*>(base)[at + i]);
      break;
    case KvFormat::f16:
      for (int64_t i = 0; i < n; i++) y[i] = f16_to_f32(static_cast<const uint16_t*>(base)[at + i]);
      break;
    case KvFormat::i8:
      for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(static_cast<const int8_t*>(base)[at + i]) * scale;
      break;
  }
}

// scratch: k [d_head][64] (transposed: scores are vectors over keys), v [64][d_head], acc [rows][d_head], max, sum.
void attend(const AttendArgs& a) {
  constexpr int64_t kb = infer_key_block;
  const int64_t dh = a.d_head, rows = a.n_tok * a.group;
  float* kt = static_cast<float*>(a.scratch);
  float *v = kt + dh * kb, *acc = v + kb * dh, *row_max = acc + rows * dh, *row_sum = row_max + rows;
  for (int64_t i = 0; i < rows * dh; i++) acc[i] = 0;
  for (int64_t r = 0; r < rows; r++) row_max[r] = -__builtin_inff(), row_sum[r] = 0;
  const int64_t mask = (int64_t{1} << a.block_shift) - 1;
  for (int64_t j0 = a.key_begin / kb * kb; j0 < a.key_end; j0 += kb) {
    const int64_t lo = j0 < a.key_begin ? a.key_begin - j0 : 0, hi = a.key_end - j0 < kb ? a.key_end - j0 : kb;
    for (int64_t i = 0; i < dh * kb; i++) kt[i] = 0;
    for (int64_t j = lo; j < hi; j++) {
      const int64_t key = j0 + j, row = a.table[key >> a.block_shift] + (key & mask);
      float* vj = v + j * dh;
      widen(vj, a.format, a.k, row * a.d_head, a.k_scale != nullptr ? a.k_scale[row] : 1.0f, dh);
      for (int64_t i = 0; i < dh; i++) kt[i * kb + j] = vj[i];
      widen(vj, a.format, a.v, row * a.d_head, a.v_scale != nullptr ? a.v_scale[row] : 1.0f, dh);
    }
    for (int64_t r = 0; r < rows; r++) {
      int64_t end = a.visible + r / a.group - j0;
      end = end < hi ? end : hi;
      if (end <= lo) continue;
      const float* q = a.q + r / a.group * a.ldq + r % a.group * dh;
      float s[kb] = {};
      for (int64_t i = 0; i < dh; i++) {
        const float qi = q[i] * a.scale;
        for (int64_t j = 0; j < kb; j++) s[j] += qi * kt[i * kb + j];
      }
      float m = row_max[r];
      for (int64_t j = lo; j < end; j++) m = s[j] > m ? s[j] : m;
      const float shift = m == -__builtin_inff() ? 0.0f : m;  // nothing but -inf so far: exp(-inf - 0) = 0
      const float keep = exp_f32(row_max[r] - shift);
      float sum = 0;
      for (int64_t j = 0; j < kb; j++) s[j] = j >= lo && j < end ? exp_f32(s[j] - shift) : 0.0f;
      for (int64_t j = lo; j < end; j++) sum += s[j];
      row_max[r] = m;
      row_sum[r] = row_sum[r] * keep + sum;
      float* o = acc + r * dh;
#pragma omp simd
      for (int64_t i = 0; i < dh; i++) o[i] *= keep;
      for (int64_t j = lo; j < end; j++) {
        const float p = s[j];
#pragma omp simd
        for (int64_t i = 0; i < dh; i++) o[i] += p * v[j * dh + i];
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    if (a.partial != nullptr) {
      float* to = a.partial + r * (dh + 2);
      for (int64_t i = 0; i < dh; i++) to[i] = acc[r * dh + i];
      to[dh] = row_max[r], to[dh + 1] = row_sum[r];
    } else {
      float* to = a.out + r / a.group * a.ldo + r % a.group * dh;
      const float inv = 1.0f / row_sum[r];
      for (int64_t i = 0; i < dh; i++) to[i] = acc[r * dh + i] * inv;
    }
  }
}

}  // namespace mm::MM_ISA
