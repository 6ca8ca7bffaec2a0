// The CPU's kernel table and the drivers too small for a file of their own.
#include <cmath>
#include <cstring>
#include <vector>

#include "base/cpu_features.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "kernels/cpu/drivers.h"

namespace mm {

namespace cpu {

const SimdTable& simd() {
#ifdef MM_X86
  static const SimdTable& chosen = selected_isa() >= Isa::avx512 ? avx512::table
                                   : selected_isa() == Isa::avx2 ? avx2::table
                                                                 : scalar::table;
  return chosen;
#else
  return scalar::table;
#endif
}

float* thread_scratch(int slot, size_t n) {
  static thread_local std::vector<float> blocks[5];
  std::vector<float>& b = blocks[slot];
  if (b.size() < n) b.resize(n + n / 4);
  return b.data();
}

static void embed_fwd(float* out, const float* table, const int32_t* ids, int64_t n, int64_t d) {
  gather_rows(out, table, ids, n, d);
}

// Each thread owns a range of columns and walks all tokens, so rows that occur twice are summed in token order.
static void embed_bwd(float* dtable, const float* dout, const int32_t* ids, int64_t n, int64_t d) {
  parallel_for(d, 16, [&](int64_t c0, int64_t c1) {
    for (int64_t t = 0; t < n; t++) simd().axpy(dtable + ids[t] * d + c0, 1.0f, dout + t * d + c0, c1 - c0);
  });
}

static void swiglu_fwd(float* act, const float* gate_up, int64_t n, int64_t f) {
  parallel_for(n, 4, [&](int64_t b, int64_t e) { simd().swiglu_fwd(act + b * f, gate_up + 2 * b * f, e - b, f); });
}

static void swiglu_bwd(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f) {
  parallel_for(n, 4, [&](int64_t b, int64_t e) {
    simd().swiglu_bwd(dgate_up + 2 * b * f, dact + b * f, gate_up + 2 * b * f, e - b, f);
  });
}

static void logprob_fwd(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v) {
  parallel_for(n, 2, [&](int64_t b, int64_t e) {
    simd().logprob_fwd(logp + b, lse + b, logits + b * v, targets + b, e - b, v);
  });
}

static void logprob_bwd(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v) {
  parallel_for(
      n, 2, [&](int64_t b, int64_t e) { simd().logprob_bwd(logits + b * v, lse + b, g + b, targets + b, e - b, v); });
}

static void dropout(float* x, float p, uint64_t seed, uint64_t stream, int64_t n) {
  const float keep = 1.0f / (1.0f - p);
  parallel_for((n + 3) / 4, 1024, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const auto r = philox4x32(seed, stream, static_cast<uint64_t>(i));
      for (int64_t j = 0; j < 4 && 4 * i + j < n; j++)
        x[4 * i + j] *= to_unit_float(r[static_cast<size_t>(j)]) < p ? 0.0f : keep;
    }
  });
}

static void add(float* y, const float* x, int64_t n) {
  parallel_for(n, 4096, [&](int64_t b, int64_t e) { simd().axpy(y + b, 1.0f, x + b, e - b); });
}

static void copy(float* y, const float* x, int64_t n) {
  parallel_for(n, 1 << 16,
               [&](int64_t b, int64_t e) { std::memcpy(y + b, x + b, static_cast<size_t>(e - b) * sizeof(float)); });
}

static void zero(float* x, int64_t n) {
  parallel_for(n, 1 << 16,
               [&](int64_t b, int64_t e) { std::memset(x + b, 0, static_cast<size_t>(e - b) * sizeof(float)); });
}

static void adamw(float* p, const float* g, float* m, float* v, const AdamWArgs& a, int64_t n) {
  const auto step = static_cast<double>(a.step);
  const AdamWStep args{.keep = static_cast<float>(1.0 - a.lr * a.weight_decay),
                       .step_size = static_cast<float>(a.lr / (1.0 - std::pow(a.beta1, step))),
                       .beta1 = static_cast<float>(a.beta1),
                       .one_minus_beta1 = static_cast<float>(1.0 - a.beta1),
                       .beta2 = static_cast<float>(a.beta2),
                       .one_minus_beta2 = static_cast<float>(1.0 - a.beta2),
                       .inv_sqrt_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step))),
                       .eps = static_cast<float>(a.eps),
                       .grad_scale = a.grad_scale};
  parallel_for(n, 16384, [&](int64_t b, int64_t e) { simd().adamw(p + b, g + b, m + b, v + b, args, e - b); });
}

static double sum_sq(const float* x, int64_t n) {
  constexpr int64_t chunk = 1 << 16;
  const int64_t chunks = (n + chunk - 1) / chunk;
  static thread_local std::vector<double> partial;
  partial.assign(static_cast<size_t>(chunks), 0.0);
  double* out = partial.data();
  parallel_for(chunks, 1, [&](int64_t b, int64_t e) {
    for (int64_t c = b; c < e; c++)
      out[c] = simd().sum_sq(x + c * chunk, c * chunk + chunk < n ? chunk : n - c * chunk);
  });
  double s = 0;
  for (const double v : partial) s += v;
  return s;
}

}  // namespace cpu

const KernelTable& cpu_kernels() {
  static const KernelTable table = {
      .linear_fwd = cpu::linear_fwd,
      .linear_bwd = cpu::linear_bwd,
      .embed_fwd = cpu::embed_fwd,
      .embed_bwd = cpu::embed_bwd,
      .rmsnorm_fwd = cpu::rmsnorm_fwd,
      .rmsnorm_bwd = cpu::rmsnorm_bwd,
      .qk_norm_rope_fwd = cpu::qk_norm_rope_fwd,
      .qk_norm_rope_bwd = cpu::qk_norm_rope_bwd,
      .attention_fwd = cpu::attention_fwd,
      .attention_bwd = cpu::attention_bwd,
      .swiglu_fwd = cpu::swiglu_fwd,
      .swiglu_bwd = cpu::swiglu_bwd,
      .logprob_fwd = cpu::logprob_fwd,
      .logprob_bwd = cpu::logprob_bwd,
      .dropout = cpu::dropout,
      .add = cpu::add,
      .moe_route_fwd = cpu::moe_route_fwd,
      .moe_route_bwd = cpu::moe_route_bwd,
      .gather_rows = cpu::gather_rows,
      .scatter_rows = cpu::scatter_rows,
      .moe_combine_fwd = cpu::moe_combine_fwd,
      .moe_combine_bwd = cpu::moe_combine_bwd,
      .scatter_add = cpu::scatter_add,
      .adamw = cpu::adamw,
      .copy = cpu::copy,
      .zero = cpu::zero,
      .sum_sq = cpu::sum_sq,
  };
  return table;
}

}  // namespace mm
