// Cross-entropy on rows of logits [n, v]: lse = log sum exp(x), logp = x[target] - lse, dx = g (onehot - exp(x - lse)).
//
// Memory-bound when a row is read once and written once, so one block owns a row and keeps it in registers: 4 packs of
// 8 a thread, 224 threads for v = 6400 (a row of 12.8 KB). Every warp takes exp(x - its own maximum) straight away; the
// block then exchanges one pair (maximum, sum) a warp behind one barrier, and the exponentials, rescaled, are the
// probabilities: one exp an element.
//
//   warp 0: max m0, sum of exp(x - m0) = s0 |
//   warp 1: m1, s1                          | barrier; M = max m_i, S = sum s_i exp(m_i - M)
//   ...                                     | p = exp(x - m_i) exp(m_i - M) / S, lse = M + log S
//
// logp is (x - M) - log S and not x - lse: near 0 it must not carry the rounding of a large logit. Rows of more than
// 32768 logits, and rows whose width or address do not allow 16-byte accesses, are read twice.
//
// Bytes: 2 n v sizeof(T) for logprob_fwd_bwd and logprob_bwd, half of it for logprob_fwd.
//
// H100, bf16, v = 6400, forward and backward in one, % of a copy of 3.0 TB/s: 4096 rows 40 us (88 %), 12288 110 us
// (96 %), 24576 214 us (99 %); 2048 rows that are still in L2 14.6 us (120 %). The naive variant (logprob_naive.cu)
// takes 794 us for 12288.
//
// Slower, 12288 rows and 2048 in L2: 16-bit logits kept in place of exponentials and exp taken twice 111 and 16.2 us (8
// packs a thread 111 and 17.0, 2 packs 114 and 18.4); looking at the target before loading the row 114 and 15.7 us.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/logprob_naive.h"

namespace mm::cuda {
namespace {

constexpr int P = 4;  // packs of 8 logits a thread
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {  // 2 units in the last place; below 2^-126: 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// exp(x - m)
__device__ __forceinline__ float exp_diff(float x, float m) { return exp2_approx((x - m) * kLog2E); }

struct MaxSum {
  float max, sum;  // sum of exp(x - max)
};

// An empty or all -inf part has maximum -inf and must not turn exp(x - max) into NaN.
__device__ __forceinline__ float finite_base(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ MaxSum warp_combine(MaxSum a) {
  const float max = warp_max(a.max);
  return {max, warp_sum(a.sum * exp_diff(a.max, finite_base(max)))};
}

// Combines the pairs of the block's warps; every thread gets the result.
__device__ __forceinline__ MaxSum block_combine(MaxSum warp_pair, MaxSum* shared) {
  const int lane = threadIdx.x % 32, n_warp = blockDim.x / 32;
  if (n_warp == 1) return warp_pair;
  if (lane == 0) shared[threadIdx.x / 32] = warp_pair;
  __syncthreads();
  return warp_combine(lane < n_warp ? shared[lane] : MaxSum{-INFINITY, 0.0f});
}

struct Outputs {
  float *logp, *lse;  // lse may be null
  const float* g;
  const int32_t* targets;
};

template <class T, bool kGrad, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) row_kernel(T* logits, Outputs o, int v) {
  __shared__ MaxSum shared[32];
  const int64_t row = blockIdx.x;
  const int threads = blockDim.x, tid = threadIdx.x;
  T* x = logits + row * v;
  Raw<T, 8> raw[P];  // on their way before anything else is looked at
#pragma unroll
  for (int p = 0; p < P; p++) {
    const int c = (p * threads + tid) * 8;
    if (c < v) raw[p].load(x + c);
  }
  const int target = o.targets[row];
  const float g = kGrad ? o.g[row] : 0.0f;
  if (target < 0) {
    if (tid == 0) o.logp[row] = 0;
    if (tid == 0 && o.lse != nullptr) o.lse[row] = 0;
    const float none[8] = {};
    for (int c = tid * 8; kGrad && c < v; c += threads * 8) store(x + c, none);
    return;
  }
  const bool owner = tid == target / 8 % threads;  // of the target's logit
  const float x_target = owner ? to_float(x[target]) : 0.0f;
  float e[P][8], max = -INFINITY;
#pragma unroll
  for (int p = 0; p < P; p++) {
    if ((p * threads + tid) * 8 < v) raw[p].get(e[p]);
    else {
#pragma unroll
      for (int i = 0; i < 8; i++) e[p][i] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) max = fmaxf(max, e[p][i]);  // a NaN shows in the sum
  }
  max = warp_max(max);
  const float base = finite_base(max);
  float sum = 0;
#pragma unroll
  for (int p = 0; p < P; p++) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum += e[p][i] = exp_diff(e[p][i], base);
  }
  const MaxSum all = block_combine({max, warp_sum(sum)}, shared);
  const float log_sum = logf(all.sum);
  if (tid == 0 && o.lse != nullptr) o.lse[row] = all.max + log_sum;
  if (owner) o.logp[row] = x_target - all.max - log_sum;
  if constexpr (kGrad) {
    const float inverse = 1.0f / all.sum, scale = -g * (exp_diff(base, all.max) * inverse);
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int c = (p * threads + tid) * 8;
#pragma unroll
      for (int i = 0; i < 8; i++) e[p][i] *= scale;
      if (c < v) store(x + c, e[p]);
    }
    if (owner) x[target] = from_float<T>(g * (1.0f - exp_diff(x_target, all.max) * inverse));
  }
}

// Any width: reads the row for its maximum and sum, and again for the gradient.
template <class T, int V, bool kGrad>
__global__ void __launch_bounds__(1024) row_any(T* logits, Outputs o, int64_t v) {
  __shared__ MaxSum shared[32];
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * V, first = threadIdx.x * V;
  const int target = o.targets[row];
  T* x = logits + row * v;
  MaxSum part = {-INFINITY, 0.0f};
  if (target >= 0) {
    for (int64_t c = first; c < v; c += step) {
      float a[V], max = part.max;
      load(a, x + c);
#pragma unroll
      for (int i = 0; i < V; i++) max = fmaxf(max, a[i]);
      const float base = finite_base(max);
      float sum = part.sum * exp_diff(part.max, base);
#pragma unroll
      for (int i = 0; i < V; i++) sum += exp_diff(a[i], base);
      part = {max, sum};
    }
  }
  const float x_target = target >= 0 ? to_float(x[target]) : 0.0f;
  const MaxSum all = block_combine(warp_combine(part), shared);
  // Behind the barrier, so that every thread has read the target's logit before its owner overwrites it. A block of one
  // warp has no barrier there.
  __syncthreads();
  const float log_sum = logf(all.sum);
  if (threadIdx.x == 0) {
    o.logp[row] = target >= 0 ? x_target - all.max - log_sum : 0.0f;
    if (o.lse != nullptr) o.lse[row] = target >= 0 ? all.max + log_sum : 0.0f;
  }
  if constexpr (kGrad) {
    const float g = o.g[row], inverse = 1.0f / all.sum;
    for (int64_t c = first; c < v; c += step) {
      float a[V];
      if (target >= 0) load(a, x + c);
#pragma unroll
      for (int i = 0; i < V; i++)
        a[i] = target >= 0 ? g * ((c + i == target ? 1.0f : 0.0f) - exp_diff(a[i], all.max) * inverse) : 0.0f;
      store(x + c, a);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(256)
    bwd_kernel(T* logits, const float* lse, const float* g, const int32_t* targets, int64_t v) {
  const int64_t row = blockIdx.x;
  const int target = targets[row];
  const float scale = g[row], l = lse[row];
  T* x = logits + row * v;
#pragma unroll 2
  for (int64_t c = threadIdx.x * V; c < v; c += 256 * V) {
    float a[V];
    load(a, x + c);
#pragma unroll
    for (int i = 0; i < V; i++)
      a[i] = target >= 0 ? scale * ((c + i == target ? 1.0f : 0.0f) - exp_diff(a[i], l)) : 0.0f;
    store(x + c, a);
  }
}

template <class T, bool kGrad>
void rows(const Context& ctx, T* logits, const Outputs& o, int64_t n, int64_t v) {
  const auto blocks = static_cast<unsigned>(n);
  const auto row_threads = static_cast<unsigned>(div_up(div_up(v, 8 * P), 32) * 32);
  const bool vectors = v % 8 == 0 && aligned({logits});
  if (vectors && v <= 256 * 8 * P) {
    row_kernel<T, kGrad, 256, 4><<<blocks, row_threads, 0, ctx.stream>>>(logits, o, static_cast<int>(v));
  } else if (vectors && v <= 1024 * 8 * P) {
    row_kernel<T, kGrad, 1024, 1><<<blocks, row_threads, 0, ctx.stream>>>(logits, o, static_cast<int>(v));
  } else if (vectors) {
    row_any<T, 8, kGrad><<<blocks, 1024, 0, ctx.stream>>>(logits, o, v);
  } else {
    const auto threads = static_cast<unsigned>(std::min<int64_t>(1024, div_up(v, 32) * 32));
    row_any<T, 1, kGrad><<<blocks, threads, 0, ctx.stream>>>(logits, o, v);
  }
  MM_CUDA_LAUNCHED();
}

}  // namespace

void logprob_fwd(const Context& ctx, DType t, float* logp, float* lse, const void* logits, const int32_t* targets,
                 int64_t n, int64_t v) {
  if (n == 0) return;
  if (ctx.naive_ce) return naive_logprob(ctx, t, nullptr, logp, lse, logits, nullptr, targets, n, v);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);  // the logits are not written
    rows<T, false>(ctx, const_cast<T*>(static_cast<const T*>(logits)), {logp, lse, nullptr, targets}, n, v);
  });
}

void logprob_bwd(const Context& ctx, DType t, void* logits, const float* lse, const float* g, const int32_t* targets,
                 int64_t n, int64_t v) {
  if (n == 0) return;
  if (ctx.naive_ce) return naive_logprob_bwd(ctx, t, logits, lse, g, targets, n, v);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    auto* x = static_cast<T*>(logits);
    const auto blocks = static_cast<unsigned>(n);
    if (v % 8 == 0 && aligned({logits})) bwd_kernel<T, 8><<<blocks, 256, 0, ctx.stream>>>(x, lse, g, targets, v);
    else bwd_kernel<T, 1><<<blocks, 256, 0, ctx.stream>>>(x, lse, g, targets, v);
  });
  MM_CUDA_LAUNCHED();
}

void logprob_fwd_bwd(const Context& ctx, DType t, void* logits, float* logp, float* lse, const float* g,
                     const int32_t* targets, int64_t n, int64_t v) {
  if (n == 0) return;
  if (ctx.naive_ce) return naive_logprob(ctx, t, logits, logp, lse, logits, g, targets, n, v);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    rows<T, true>(ctx, static_cast<T*>(logits), {logp, lse, g, targets}, n, v);
  });
}

}  // namespace mm::cuda
