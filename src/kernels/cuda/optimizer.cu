// AdamW (Loshchilov and Hutter 2019) with clipping by the global norm, the norm itself, and the sum of a step's losses.
//   g' = g min(1, max_norm / (norm + 1e-6)),  m = beta1 m + (1 - beta1) g',  v = beta2 v + (1 - beta2) g'^2
//   p = p (1 - lr decay) - lr / (1 - beta1^k) m / (sqrt(v / (1 - beta2^k)) + eps)
//
// A kernel of one thread turns the step's state into factors (in double: 1 - beta2 keeps its digits) and counts the
// update, so that the host need not know them when a captured graph is launched again. The update itself is
// memory-bound: 16 bytes read, 12 + sizeof(T) written a parameter; a thread takes 4 parameters (16-byte accesses).
//
// Sums: each thread adds 16 squares in fp32, then in double; blocks leave one double each, which a second kernel adds
// in a fixed order. On devices of the consumer kind, double additions are 64 times slower than fp32: one in 16 costs
// them less than the memory does.
// H100, 63.9M parameters: update with bf16 weights 649 us (99 % of a copy of 3.0 TB/s; 8 parameters a thread 660 us),
// norm 89 us (97 %).
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

constexpr int kThreads = 256;

struct Factors {
  float grad_scale, keep, step_size, rsqrt_c2;  // keep = 1 - lr decay, step_size = lr / c1
  float beta1, rest1, beta2, rest2, eps;
  int32_t active;
};

__global__ void factors_kernel(Factors* out, AdamWState* s, AdamWConst c) {
  const double inv = s->inv_scale, norm = sqrt(s->sum_sq) * inv, k = s->update_count + 1;
  Factors f;
  f.active = isfinite(s->sum_sq) ? 1 : 0;
  f.grad_scale = static_cast<float>(s->max_norm > 0 ? inv * fmin(1.0, s->max_norm / (norm + 1e-6)) : inv);
  f.keep = static_cast<float>(1.0 - s->lr * c.weight_decay);
  f.step_size = static_cast<float>(s->lr / (1.0 - pow(c.beta1, k)));
  f.rsqrt_c2 = static_cast<float>(1.0 / sqrt(1.0 - pow(c.beta2, k)));
  f.beta1 = static_cast<float>(c.beta1), f.rest1 = static_cast<float>(1.0 - c.beta1);
  f.beta2 = static_cast<float>(c.beta2), f.rest2 = static_cast<float>(1.0 - c.beta2);
  f.eps = static_cast<float>(c.eps);
  *out = f;
  if (f.active != 0) s->update_count++;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(T* w, float* p, const float* g, float* m, float* v, const Factors* factors, int64_t n) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at + V > n) return;
  float gi[V], mi[V], vi[V], pi[V];
  load(gi, g + at), load(mi, m + at), load(vi, v + at), load(pi, p + at);
  const Factors f = *factors;
  if (f.active == 0) return;
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float x = gi[i] * f.grad_scale;
    mi[i] = f.beta1 * mi[i] + f.rest1 * x;
    vi[i] = f.beta2 * vi[i] + f.rest2 * x * x;
    pi[i] = pi[i] * f.keep - f.step_size * mi[i] / (sqrtf(vi[i]) * f.rsqrt_c2 + f.eps);
  }
  store(m + at, mi), store(v + at, vi), store(p + at, pi);
  if (w != nullptr) store(w + at, pi);
}

// Squares of x, one double a block.
template <int V>
__global__ void __launch_bounds__(kThreads) sum_sq_kernel(double* out, const float* x, int64_t n) {
  constexpr int kLoads = 16 / V;
  __shared__ double shared[32];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * 16;
  double sum = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * 16 + threadIdx.x * V; first < n; first += step) {
    float v[kLoads][V] = {};
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      const int64_t at = first + j * kThreads * V;
      if (at + V <= n) load(v[j], x + at);
      else if (at < n) {
#pragma unroll
        for (int i = 0; i < V; i++) v[j][i] = at + i < n ? x[at + i] : 0.0f;
      }
    }
    float s = 0;
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
#pragma unroll
      for (int i = 0; i < V; i++) s += v[j][i] * v[j][i];
    }
    sum += static_cast<double>(s);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// *out (+)= sum of parts
__global__ void __launch_bounds__(kThreads) total_kernel(double* out, const double* parts, int n, bool accumulate) {
  __shared__ double shared[32];
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += kThreads) sum += parts[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *out = accumulate ? *out + sum : sum;
}

__global__ void __launch_bounds__(1024) nll_kernel(double* out, const float* logp, const float* w, int64_t n) {
  __shared__ double shared[32];
  double sum = 0;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 1024 + threadIdx.x; i < n; i += int64_t{1024} * gridDim.x)
    sum -= static_cast<double>(w[i]) * static_cast<double>(logp[i]);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

void adamw(const Context& ctx, DType t, void* w, float* p, const float* g, float* m, float* v, AdamWState* state,
           const AdamWConst& c, int64_t n) {
  Scratch scratch(ctx);
  auto* factors = scratch.take<Factors>(1);
  factors_kernel<<<1, 1, 0, ctx.stream>>>(factors, state, c);
  MM_CUDA_LAUNCHED();
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    auto* wt = static_cast<T*>(w);
    const bool vectors = aligned({p, g, m, v}) && aligned({w}, 4 * sizeof(T));
    const int64_t packs = vectors ? n / 4 : 0, rest = n - packs * 4, at = packs * 4;
    if (packs > 0) {
      adamw_kernel<T, 4>
          <<<static_cast<unsigned>(div_up(packs, kThreads)), kThreads, 0, ctx.stream>>>(wt, p, g, m, v, factors, at);
    }
    if (rest > 0) {
      adamw_kernel<T, 1><<<static_cast<unsigned>(div_up(rest, kThreads)), kThreads, 0, ctx.stream>>>(
          wt != nullptr ? wt + at : nullptr, p + at, g + at, m + at, v + at, factors, rest);
    }
  });
  MM_CUDA_LAUNCHED();
}

void sum_sq(const Context& ctx, double* out, const float* x, int64_t n) {
  const auto blocks =
      static_cast<int>(std::clamp<int64_t>(div_up(n, kThreads * 16), 1, int64_t{8} * std::max(1, ctx.n_sm)));
  Scratch scratch(ctx);
  auto* parts = scratch.take<double>(static_cast<size_t>(blocks));
  double* to = blocks == 1 ? out : parts;
  if (aligned({x})) sum_sq_kernel<4><<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream>>>(to, x, n);
  else sum_sq_kernel<1><<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream>>>(to, x, n);
  MM_CUDA_LAUNCHED();
  if (blocks == 1) return;
  total_kernel<<<1, kThreads, 0, ctx.stream>>>(out, parts, blocks, false);
  MM_CUDA_LAUNCHED();
}

void weighted_nll(const Context& ctx, double* out, const float* logp, const float* w, int64_t n, bool accumulate) {
  if (n == 0 && accumulate) return;
  const auto blocks = static_cast<int>(std::clamp<int64_t>(div_up(n, 4096), 1, 64));
  Scratch scratch(ctx);
  auto* parts = scratch.take<double>(static_cast<size_t>(blocks));
  nll_kernel<<<static_cast<unsigned>(blocks), 1024, 0, ctx.stream>>>(parts, logp, w, n);
  total_kernel<<<1, kThreads, 0, ctx.stream>>>(out, parts, blocks, accumulate);
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
