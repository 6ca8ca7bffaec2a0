// Cross-entropy, unfused: maximum, sum of exponentials, log-softmax and gradient are kernels of their own, and the
// log-probabilities [n, v] lie in memory as fp32 between them. Bytes an element (bf16): 2 | 2 | 2 + 4 | 4 + 2 = 16, the
// fused kernel moves 4. The log-probabilities take ctx.scratch, so rows come in pieces that fit; an eager framework
// allocates them whole.
#include "kernels/cuda/logprob_naive.h"

#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void row_max_kernel(float* out, const T* x, int64_t v) {
  __shared__ float shared[32];
  float m = -INFINITY;
  for (int64_t i = threadIdx.x; i < v; i += kThreads) m = max_nan(m, to_float(x[blockIdx.x * v + i]));
  m = block_max(m, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = m;
}

template <class T>
__global__ void row_exp_sum_kernel(float* out, const T* x, const float* max, int64_t v) {
  __shared__ float shared[32];
  const float m = max[blockIdx.x];
  float s = 0;
  for (int64_t i = threadIdx.x; i < v; i += kThreads) s += __expf(to_float(x[blockIdx.x * v + i]) - m);
  s = block_sum(s, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = s;
}

template <class T>
__global__ void log_softmax_kernel(float* out, const T* x, const float* max, const float* sum, int64_t v) {
  const float m = max[blockIdx.x], l = logf(sum[blockIdx.x]);
  for (int64_t i = threadIdx.x; i < v; i += kThreads) out[blockIdx.x * v + i] = to_float(x[blockIdx.x * v + i]) - m - l;
}

template <class T>
__global__ void subtract_kernel(float* out, const T* x, const float* lse, int64_t v) {
  const float l = lse[blockIdx.x];
  for (int64_t i = threadIdx.x; i < v; i += kThreads) out[blockIdx.x * v + i] = to_float(x[blockIdx.x * v + i]) - l;
}

__global__ void pick_kernel(float* logp, float* lse, const float* log_softmax, const float* max, const float* sum,
                            const int32_t* targets, int64_t n, int64_t v) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  const int target = targets[row];
  logp[row] = target >= 0 ? log_softmax[row * v + target] : 0.0f;
  if (lse != nullptr) lse[row] = target >= 0 ? max[row] + logf(sum[row]) : 0.0f;
}

template <class T>
__global__ void gradient_kernel(T* out, const float* log_softmax, const float* g, const int32_t* targets, int64_t v) {
  const int target = targets[blockIdx.x];
  const float scale = g[blockIdx.x];
  for (int64_t i = threadIdx.x; i < v; i += kThreads) {
    const float p = __expf(log_softmax[blockIdx.x * v + i]);
    out[blockIdx.x * v + i] = from_float<T>(target >= 0 ? scale * ((i == target ? 1.0f : 0.0f) - p) : 0.0f);
  }
}

int64_t rows_at_a_time(const Context& ctx, int64_t n, int64_t v) {
  return std::max<int64_t>(1, std::min(n, (static_cast<int64_t>(ctx.scratch_bytes) - 1024) / ((v + 2) * 4)));
}

}  // namespace

void naive_logprob(const Context& ctx, DType t, void* dlogits, float* logp, float* lse, const void* logits,
                   const float* g, const int32_t* targets, int64_t n, int64_t v) {
  const int64_t step = rows_at_a_time(ctx, n, v);
  Scratch scratch(ctx);
  auto* log_softmax = scratch.take<float>(static_cast<size_t>(step * v));
  auto *max = scratch.take<float>(static_cast<size_t>(step)), *sum = scratch.take<float>(static_cast<size_t>(step));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t at = 0; at < n; at += step) {
      const int64_t rows = std::min(step, n - at);
      const auto blocks = static_cast<unsigned>(rows);
      const T* x = static_cast<const T*>(logits) + at * v;
      row_max_kernel<<<blocks, kThreads, 0, ctx.stream>>>(max, x, v);
      row_exp_sum_kernel<<<blocks, kThreads, 0, ctx.stream>>>(sum, x, max, v);
      log_softmax_kernel<<<blocks, kThreads, 0, ctx.stream>>>(log_softmax, x, max, sum, v);
      pick_kernel<<<static_cast<unsigned>(div_up(rows, kThreads)), kThreads, 0, ctx.stream>>>(
          logp + at, lse != nullptr ? lse + at : nullptr, log_softmax, max, sum, targets + at, rows, v);
      if (dlogits != nullptr) {
        gradient_kernel<<<blocks, kThreads, 0, ctx.stream>>>(static_cast<T*>(dlogits) + at * v, log_softmax, g + at,
                                                             targets + at, v);
      }
      MM_CUDA_LAUNCHED();
    }
  });
}

void naive_logprob_bwd(const Context& ctx, DType t, void* logits, const float* lse, const float* g,
                       const int32_t* targets, int64_t n, int64_t v) {
  const int64_t step = rows_at_a_time(ctx, n, v);
  Scratch scratch(ctx);
  auto* log_softmax = scratch.take<float>(static_cast<size_t>(step * v));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t at = 0; at < n; at += step) {
      const auto blocks = static_cast<unsigned>(std::min(step, n - at));
      T* x = static_cast<T*>(logits) + at * v;
      subtract_kernel<<<blocks, kThreads, 0, ctx.stream>>>(log_softmax, x, lse + at, v);
      gradient_kernel<<<blocks, kThreads, 0, ctx.stream>>>(x, log_softmax, g + at, targets + at, v);
      MM_CUDA_LAUNCHED();
    }
  });
}

}  // namespace mm::cuda
