// RMSNorm, unfused: every operation of the formula is a kernel that reads its operands from memory and writes its
// result there, with fp32 intermediate tensors, as an eager framework does it. Results equal those of norm.cu up to the
// order of the sums; the traffic is what the comparison is about:
//   forward: square, mean, rsqrt, multiply, multiply: 2 + 4 | 4 | - | 2 + 4 + 4 | 4 + 2 = 22 bytes an element (bf16),
//   fused 4. Backward about 60, fused 8.
// Intermediate tensors lie in ctx.scratch, so rows are taken in pieces that fit; an eager framework allocates them
// whole.
#include "kernels/cuda/norm_naive.h"

#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

// out = f(a, b), element by element; b is indexed like a, by row or by column.
enum class By { element, row, column };

struct Square {
  __device__ static float of(float a, float /*b*/) { return a * a; }
};
struct Multiply {
  __device__ static float of(float a, float b) { return a * b; }
};
struct Subtract {
  __device__ static float of(float a, float b) { return a - b; }
};
struct Add {
  __device__ static float of(float a, float b) { return a + b; }
};

template <class Op, By by, int V, class Out, class A, class B>
__global__ void map_kernel(Out* out, const A* a, const B* b, int64_t n, int64_t d) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= n) return;
  float x[V], y[V];
  load(x, a + i);
  if constexpr (by == By::element) load(y, b + i);
  else if constexpr (by == By::column) load(y, b + i % d);
  else {
#pragma unroll
    for (int j = 0; j < V; j++) y[j] = to_float(b[i / d]);
  }
#pragma unroll
  for (int j = 0; j < V; j++) x[j] = Op::of(x[j], y[j]);
  store(out + i, x);
}

template <class Op, By by, class Out, class A, class B>
void map(const Context& ctx, Out* out, const A* a, const B* b, int64_t n, int64_t d) {
  if (d % 4 == 0 && aligned({out, a}) && (by == By::row || aligned({b})))
    map_kernel<Op, by, 4><<<static_cast<unsigned>(div_up(n, 1024)), 256, 0, ctx.stream>>>(out, a, b, n, d);
  else map_kernel<Op, by, 1><<<static_cast<unsigned>(div_up(n, 256)), 256, 0, ctx.stream>>>(out, a, b, n, d);
  MM_CUDA_LAUNCHED();
}

__global__ void row_mean_kernel(float* out, const float* x, int64_t d) {
  __shared__ float shared[32];
  float s = 0;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) s += x[blockIdx.x * d + i];
  s = block_sum(s, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = s / static_cast<float>(d);
}
void row_mean(const Context& ctx, float* out, const float* x, int64_t n, int64_t d) {
  row_mean_kernel<<<static_cast<unsigned>(n), static_cast<unsigned>(std::min<int64_t>(256, div_up(d, 32) * 32)), 0,
                    ctx.stream>>>(out, x, d);
  MM_CUDA_LAUNCHED();
}

__global__ void rsqrt_kernel(float* out, const float* mean, float eps, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __frsqrt_rn(mean[i] + eps);
}

__global__ void column_sum_kernel(float* partial, const float* x, int64_t n, int d) {
  const int c = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (c >= d) return;
  float s = 0;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) s += x[row * d + c];
  partial[static_cast<int64_t>(blockIdx.y) * d + c] = s;
}

constexpr int kPartialRows = 64;

// Rows at a time, so that `tensors` fp32 tensors of them and the sums by row and column fit.
int64_t rows_at_a_time(const Context& ctx, int64_t n, int64_t d, int tensors) {
  const int64_t fixed = (kPartialRows * d + 64 * (tensors + 4)) * 4;
  const int64_t rows = (static_cast<int64_t>(ctx.scratch_bytes) - fixed) / ((tensors * d + 2) * 4);
  return std::max<int64_t>(1, std::min(n, rows));
}

template <class T>
void fwd(const Context& ctx, T* y, float* rstd, const T* x, const T* w, float eps, int64_t n, int64_t d) {
  const int64_t step = rows_at_a_time(ctx, n, d, 1);
  Scratch scratch(ctx);
  float* tensor = scratch.take<float>(static_cast<size_t>(step * d));
  float* mean = scratch.take<float>(static_cast<size_t>(step));
  float* rstd_here = scratch.take<float>(static_cast<size_t>(step));
  for (int64_t at = 0; at < n; at += step) {
    const int64_t rows = std::min(step, n - at), size = rows * d;
    float* r = rstd != nullptr ? rstd + at : rstd_here;
    map<Square, By::element>(ctx, tensor, x + at * d, x + at * d, size, d);
    row_mean(ctx, mean, tensor, rows, d);
    rsqrt_kernel<<<static_cast<unsigned>(div_up(rows, 256)), 256, 0, ctx.stream>>>(r, mean, eps, rows);
    MM_CUDA_LAUNCHED();
    map<Multiply, By::row>(ctx, tensor, x + at * d, r, size, d);
    map<Multiply, By::column>(ctx, y + at * d, tensor, w, size, d);
  }
}

template <class T>
void bwd(const Context& ctx, T* dx, float* dw, const T* dy, const T* x, const float* rstd, const T* w, int64_t n,
         int64_t d) {
  const int64_t step = rows_at_a_time(ctx, n, d, 3);
  Scratch scratch(ctx);
  float* xhat = scratch.take<float>(static_cast<size_t>(step * d));
  float* a = scratch.take<float>(static_cast<size_t>(step * d));
  float* b = scratch.take<float>(static_cast<size_t>(step * d));
  float* mean = scratch.take<float>(static_cast<size_t>(step));
  float* partial = scratch.take<float>(static_cast<size_t>(kPartialRows * d));
  for (int64_t at = 0; at < n; at += step) {
    const int64_t rows = std::min(step, n - at), size = rows * d;
    map<Multiply, By::row>(ctx, xhat, x + at * d, rstd + at, size, d);
    map<Multiply, By::element>(ctx, a, dy + at * d, xhat, size, d);
    const int split = static_cast<int>(std::min<int64_t>(kPartialRows, div_up(rows, 16)));
    column_sum_kernel<<<dim3(static_cast<unsigned>(div_up(d, 32)), static_cast<unsigned>(split)), 32, 0, ctx.stream>>>(
        partial, a, rows, static_cast<int>(d));
    MM_CUDA_LAUNCHED();
    if (dw != nullptr) add_column_sums(ctx, {dw, partial, split}, static_cast<int>(d));
    map<Multiply, By::column>(ctx, a, dy + at * d, w, size, d);  // a = w dy
    map<Multiply, By::element>(ctx, b, a, xhat, size, d);
    row_mean(ctx, mean, b, rows, d);
    map<Multiply, By::row>(ctx, b, xhat, mean, size, d);
    map<Subtract, By::element>(ctx, a, a, b, size, d);
    map<Multiply, By::row>(ctx, a, a, rstd + at, size, d);
    map<Add, By::element>(ctx, dx + at * d, dx + at * d, a, size, d);
  }
}

}  // namespace

void naive_rmsnorm_fwd(const Context& ctx, DType t, void* y, float* rstd, const void* x, const void* w, float eps,
                       int64_t n, int64_t d) {
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    fwd<T>(ctx, static_cast<T*>(y), rstd, static_cast<const T*>(x), static_cast<const T*>(w), eps, n, d);
  });
}

void naive_rmsnorm_bwd(const Context& ctx, DType t, void* dx, float* dw, const void* dy, const void* x,
                       const float* rstd, const void* w, int64_t n, int64_t d) {
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    bwd<T>(ctx, static_cast<T*>(dx), dw, static_cast<const T*>(dy), static_cast<const T*>(x), rstd,
           static_cast<const T*>(w), n, d);
  });
}

}  // namespace mm::cuda
