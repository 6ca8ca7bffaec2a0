// Drivers of the normalisation kernels. Weight gradients are summed over a fixed split of the rows, so they do not
// depend on the number of threads.
#include <algorithm>
#include <cstring>

#include "base/thread_team.h"
#include "kernels/cpu/drivers.h"

namespace mm::cpu {

namespace {

// Runs f(begin, end, partial) over a fixed split of n rows, each chunk with its own zeroed partial [d]; adds them to
// out in order.
template <class F>
void sum_over_chunks(float* out, int64_t n, int64_t d, F&& f) {
  const int64_t chunk = std::max<int64_t>(32, (n + 15) / 16), chunks = (n + chunk - 1) / chunk;
  float* partial = thread_scratch(4, static_cast<size_t>(chunks * d));
  parallel_dynamic(chunks, [&](int64_t c, int) {
    std::memset(partial + c * d, 0, static_cast<size_t>(d) * sizeof(float));
    f(c * chunk, std::min(n, (c + 1) * chunk), partial + c * d);
  });
  for (int64_t c = 0; c < chunks; c++) simd().axpy(out, 1.0f, partial + c * d, d);
}

}  // namespace

void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d) {
  parallel_for(n, 8, [&](int64_t b, int64_t e) {
    simd().rmsnorm_fwd(y + b * d, rstd ? rstd + b : nullptr, x + b * d, w, eps, e - b, d);
  });
}

void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d) {
  sum_over_chunks(dw, n, d, [&](int64_t b, int64_t e, float* partial) {
    simd().rmsnorm_bwd(dx + b * d, partial, dy + b * d, x + b * d, rstd + b, w, e - b, d);
  });
}

void qk_norm_rope_fwd(float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots,
                      const float* qkv, const NormRopeArgs& a) {
  const int64_t dh = a.d_head, width = (a.n_head + 2 * a.n_kv_head) * dh, q_width = a.n_head * dh,
                kv_width = a.n_kv_head * dh;
  parallel_for(a.n, 8, [&](int64_t b, int64_t e) {
    for (int64_t t = b; t < e; t++) {
      const int64_t row = slots ? slots[t] : t;
      const float* x = qkv + t * width;
      for (int h = 0; h < a.n_head; h++) {
        simd().norm_rope_fwd(q_out + t * q_width + h * dh, 0, nullptr, x + h * dh, 0, a.q_weight, a.cos, a.sin,
                             a.positions + t, a.eps, 1, a.d_head);
      }
      for (int h = 0; h < a.n_kv_head; h++) {
        simd().norm_rope_fwd(k_out + row * ldk + h * dh, 0, nullptr, x + q_width + h * dh, 0, a.k_weight, a.cos, a.sin,
                             a.positions + t, a.eps, 1, a.d_head);
      }
      if (v_out) std::memcpy(v_out + row * ldv, x + q_width + kv_width, static_cast<size_t>(kv_width) * sizeof(float));
    }
  });
}

void qk_norm_rope_bwd(float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a) {
  const int64_t dh = a.d_head, width = (a.n_head + 2 * a.n_kv_head) * dh;
  float both[2 * 1024] = {};  // d_head is at most 1024 (checked by the op)
  sum_over_chunks(both, a.n, 2 * dh, [&](int64_t b, int64_t e, float* partial) {
    for (int h = 0; h < a.n_head + a.n_kv_head; h++) {
      const bool is_q = h < a.n_head;
      simd().norm_rope_bwd(dqkv + b * width + h * dh, width, partial + (is_q ? 0 : dh), qkv + b * width + h * dh, width,
                           is_q ? a.q_weight : a.k_weight, a.cos, a.sin, a.positions + b, a.eps, e - b, a.d_head);
    }
  });
  if (dq_weight) simd().axpy(dq_weight, 1.0f, both, dh);
  if (dk_weight) simd().axpy(dk_weight, 1.0f, both + dh, dh);
}

}  // namespace mm::cpu
