// RMSNorm: y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps), and its gradients
//   dx += rstd (w dy - xhat mean(w dy xhat)),  dw += sum over rows of dy xhat,  xhat = x rstd.
//
// Memory-bound. A row of up to 1024 elements belongs to one warp and stays in its registers between the sum of squares
// and the product, so forward reads x once and writes y once:
//
//   row of 768:  |lane 0: 8|lane 1: 8| ... |lane 31: 8| pack 0 (256 elements)
//                |lane 0: 8|lane 1: 8| ... |lane 31: 8| pack 1
//                |lane 0: 8|lane 1: 8| ... |lane 31: 8| pack 2
//
// Wider rows take a block with 2 packs of 8 a thread; rows whose width or address do not allow 16-byte accesses take
// plain loops. Backward walks the rows with a grid that fits the machine at once: each lane sums dw for its columns
// over all its rows, a block combines its warps, and add_column_sums the blocks (partial sums in ctx.scratch).
//
// Bytes: forward 2 n d sizeof(T), backward 4 n d sizeof(T) (dy, x, dx read; dx written).
//
// H100, bf16, % of a copy of 3.0 TB/s (each figure includes 2 us of launch): forward 65536x768 71.8 us (94 %),
// 24576x768 29.7 us (85 %), 12288x4096 72.1 us (94 %), 1 to 64 rows 1.7 us; backward 65536x768 143 us (95 %),
// 24576x768 60.7 us (84 %, 4.9 us of it for add_column_sums). Naive, 24576x768: 186 and 596 us.
//
// Tried, 65536x768: forward with a resident grid that loads its next row ahead 74 to 77 us, with 2 rows a warp 71.5,
// blocks of 2 or 4 warps 71.8, streaming stores 71.9; backward with 3 blocks a multiprocessor instead of 2 165 us
// (registers spill). The naive variants for comparison are in norm_naive.cu.
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm_naive.h"

namespace mm::cuda {
namespace {

constexpr int kWarps = 8;      // of a block whose warps own rows
constexpr int kWidePacks = 2;  // packs a thread of a block that owns a row

// --- one warp a row -----------------------------------------------------------------------------------------------
template <class T, int P>
__global__ void __launch_bounds__(kWarps * 32)
    fwd_warp(T* y, float* rstd, const T* x, const T* w, float eps, int64_t n, int d) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  let_next_begin();
  wait_for_previous();
  if (row >= n) return;
  Raw<T, 8> xr[P] = {}, weight[P] = {};
#pragma unroll
  for (int p = 0; p < P; p++) {
    const int c = (p * 32 + lane) * 8;
    if (c < d) xr[p].load(x + row * d + c), weight[p].load(w + c);
  }
  float s = 0;
#pragma unroll
  for (int p = 0; p < P; p++) {
    float v[8];
    xr[p].get(v);
#pragma unroll
    for (int i = 0; i < 8; i++) s += v[i] * v[i];
  }
  const float r = __frsqrt_rn(warp_sum(s) / static_cast<float>(d) + eps);
  if (rstd != nullptr && lane == 0) rstd[row] = r;
#pragma unroll
  for (int p = 0; p < P; p++) {
    const int c = (p * 32 + lane) * 8;
    float v[8], u[8];
    xr[p].forget();
    xr[p].get(v), weight[p].get(u);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * r * u[i];
    if (c < d) store(y + row * d + c, v);
  }
}

template <class T, int P, int kBlocks = 2>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    bwd_warp(T* dx, float* partial, const T* dy, const T* x, const float* rstd, const T* w, int64_t n, int d) {
  __shared__ __align__(16) float sums[kWarps][P * 256];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  Raw<T, 8> weight[P] = {};
#pragma unroll
  for (int p = 0; p < P; p++) {
    const int c = (p * 32 + lane) * 8;
    if (c < d) weight[p].load(w + c);
  }
  float dw[P][8] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < n; row += stride) {
    Raw<T, 8> xr[P] = {}, gr[P] = {}, old[P] = {};
    const float r = rstd[row];
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int c = (p * 32 + lane) * 8;
      if (c < d) xr[p].load(x + row * d + c), gr[p].load(dy + row * d + c), old[p].load(dx + row * d + c);
    }
    float s = 0;
#pragma unroll
    for (int p = 0; p < P; p++) {
      float xv[8], gv[8], u[8];
      weight[p].forget();
      xr[p].get(xv), gr[p].get(gv), weight[p].get(u);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        s += gv[i] * u[i] * xv[i];
        dw[p][i] += gv[i] * (xv[i] * r);
      }
    }
    const float m = warp_sum(s) * r / static_cast<float>(d);  // mean(w dy xhat)
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int c = (p * 32 + lane) * 8;
      float xv[8], gv[8], u[8], out[8];
      xr[p].forget(), gr[p].forget(), weight[p].forget();
      xr[p].get(xv), gr[p].get(gv), weight[p].get(u), old[p].get(out);
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] += r * (gv[i] * u[i] - xv[i] * r * m);
      if (c < d) store(dx + row * d + c, out);
    }
  }
#pragma unroll
  for (int p = 0; p < P; p++) store(&sums[warp][(p * 32 + lane) * 8], dw[p]);
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += kWarps * 32) {
    float s = sums[0][c];
#pragma unroll
    for (int i = 1; i < kWarps; i++) s += sums[i][c];
    partial[static_cast<int64_t>(blockIdx.x) * d + c] = s;
  }
}

// --- one block a row ----------------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(1024) fwd_block(T* y, float* rstd, const T* x, const T* w, float eps, int d) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  Raw<T, 8> xr[kWidePacks] = {};
#pragma unroll
  for (int p = 0; p < kWidePacks; p++) {
    const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    if (c < d) xr[p].load(x + row * d + c);
  }
  float s = 0;
#pragma unroll
  for (int p = 0; p < kWidePacks; p++) {
    float v[8];
    xr[p].get(v);
#pragma unroll
    for (int i = 0; i < 8; i++) s += v[i] * v[i];
  }
  const float r = __frsqrt_rn(block_sum(s, shared) / static_cast<float>(d) + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[row] = r;
#pragma unroll
  for (int p = 0; p < kWidePacks; p++) {
    const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    if (c >= d) continue;
    float v[8], u[8];
    xr[p].get(v);
    load(u, w + c);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * r * u[i];
    store(y + row * d + c, v);
  }
}

template <class T>
__global__ void __launch_bounds__(1024)
    bwd_block(T* dx, float* partial, const T* dy, const T* x, const float* rstd, const T* w, int64_t n, int d) {
  __shared__ float shared[2][32];
  float dw[kWidePacks][8] = {};
  int turn = 0;  // two arrays in turn, so that one barrier a row is enough
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x, turn ^= 1) {
    Raw<T, 8> xr[kWidePacks] = {}, gr[kWidePacks] = {};
    const float r = rstd[row];
    float s = 0;
#pragma unroll
    for (int p = 0; p < kWidePacks; p++) {
      const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
      if (c < d) xr[p].load(x + row * d + c), gr[p].load(dy + row * d + c);
    }
#pragma unroll
    for (int p = 0; p < kWidePacks; p++) {
      const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
      if (c >= d) continue;
      float xv[8], gv[8], u[8];
      xr[p].get(xv), gr[p].get(gv), load(u, w + c);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        s += gv[i] * u[i] * xv[i];
        dw[p][i] += gv[i] * (xv[i] * r);
      }
    }
    const float m = block_sum(s, shared[turn]) * r / static_cast<float>(d);
#pragma unroll
    for (int p = 0; p < kWidePacks; p++) {
      const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
      if (c >= d) continue;
      float xv[8], gv[8], u[8], out[8];
      xr[p].get(xv), gr[p].get(gv), load(u, w + c), load(out, dx + row * d + c);
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] += r * (gv[i] * u[i] - xv[i] * r * m);
      store(dx + row * d + c, out);
    }
  }
#pragma unroll
  for (int p = 0; p < kWidePacks; p++) {
    const int c = (p * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 8;
    if (c < d) store(partial + static_cast<int64_t>(blockIdx.x) * d + c, dw[p]);
  }
}

// --- any width and address: one block a row, element by element ----------------------------------------------------
template <class T>
__global__ void fwd_any(T* y, float* rstd, const T* x, const T* w, float eps, int64_t d) {
  __shared__ float shared[32];
  const T* xr = x + blockIdx.x * d;
  float s = 0;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) s += to_float(xr[i]) * to_float(xr[i]);
  const float r = __frsqrt_rn(block_sum(s, shared) / static_cast<float>(d) + eps);
  if (rstd != nullptr && threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
    y[blockIdx.x * d + i] = from_float<T>(to_float(xr[i]) * r * to_float(w[i]));
}

template <class T>
__global__ void bwd_any(T* dx, const T* dy, const T* x, const float* rstd, const T* w, int64_t d) {
  __shared__ float shared[32];
  const int64_t at = blockIdx.x * d;
  const float r = rstd[blockIdx.x];
  float s = 0;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
    s += to_float(dy[at + i]) * to_float(w[i]) * to_float(x[at + i]);
  const float m = block_sum(s, shared) * r / static_cast<float>(d);
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
    const float g = r * (to_float(dy[at + i]) * to_float(w[i]) - to_float(x[at + i]) * r * m);
    dx[at + i] = from_float<T>(to_float(dx[at + i]) + g);
  }
}

// Rows blockIdx.y, + gridDim.y, ... of 32 columns.
template <class T>
__global__ void dw_any(float* partial, const T* dy, const T* x, const float* rstd, int64_t n, int d) {
  const int c = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (c >= d) return;
  float s = 0;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y)
    s += to_float(dy[row * d + c]) * (to_float(x[row * d + c]) * rstd[row]);
  partial[static_cast<int64_t>(blockIdx.y) * d + c] = s;
}

// --- launches -----------------------------------------------------------------------------------------------------
template <class T>
constexpr int64_t max_warp_width = sizeof(T) == 4 ? 512 : 1024;  // more does not fit the registers
constexpr int64_t kMaxBlockWidth = 1024 * kWidePacks * 8;

// f(integral constant P) for the packs that a lane needs.
template <class T, class F>
void with_packs(int64_t d, F&& f) {
  const int64_t packs = div_up(d, 256);
  if (packs == 1) return f(std::integral_constant<int, 1>{});
  if (packs == 2) return f(std::integral_constant<int, 2>{});
  if constexpr (max_warp_width < T >> 512) {
    if (packs == 3) return f(std::integral_constant<int, 3>{});
    return f(std::integral_constant<int, 4>{});
  }
}

unsigned wide_threads(int64_t d) { return static_cast<unsigned>(div_up(div_up(d, 8 * kWidePacks), 32) * 32); }
unsigned any_threads(int64_t d) { return static_cast<unsigned>(std::min<int64_t>(256, div_up(d, 32) * 32)); }

constexpr int kBwdBlocksPerSm = 2;

template <class T>
void fwd(const Context& ctx, T* y, float* rstd, const T* x, const T* w, float eps, int64_t n, int64_t d) {
  const bool vectors = d % 8 == 0 && aligned({y, x, w});
  if (vectors && d <= max_warp_width<T>) {
    const int warps = n <= ctx.n_sm ? 1 : kWarps;  // few rows: spread over the multiprocessors
    with_packs<T>(d, [&](auto p) {
      launch_overlapped(ctx, fwd_warp<T, p.value>, dim3(static_cast<unsigned>(div_up(n, warps))),
                        static_cast<unsigned>(warps * 32), 0, 1, y, rstd, x, w, eps, n, static_cast<int>(d));
    });
  } else if (vectors && d <= kMaxBlockWidth) {
    fwd_block<T><<<static_cast<unsigned>(n), wide_threads(d), 0, ctx.stream>>>(y, rstd, x, w, eps, static_cast<int>(d));
  } else {
    fwd_any<T><<<static_cast<unsigned>(n), any_threads(d), 0, ctx.stream>>>(y, rstd, x, w, eps, d);
  }
  MM_CUDA_LAUNCHED();
}

template <class T>
void bwd(const Context& ctx, T* dx, float* dw, const T* dy, const T* x, const float* rstd, const T* w, int64_t n,
         int64_t d, int per_sm = kBwdBlocksPerSm) {
  const bool vectors = d % 8 == 0 && aligned({dx, dy, x, w});
  const int width = static_cast<int>(d);
  Scratch scratch(ctx);
  int rows = 0;  // of partial sums
  float* partial = nullptr;
  if (vectors && d <= max_warp_width<T>) {
    rows = static_cast<int>(std::min<int64_t>(div_up(n, kWarps), int64_t{per_sm} * ctx.n_sm));
    partial = scratch.take<float>(static_cast<size_t>(rows * d));
    with_packs<T>(d, [&](auto p) {
      bwd_warp<T, p.value>
          <<<static_cast<unsigned>(rows), kWarps * 32, 0, ctx.stream>>>(dx, partial, dy, x, rstd, w, n, width);
    });
  } else if (vectors && d <= kMaxBlockWidth) {
    const unsigned threads = wide_threads(d);
    rows = static_cast<int>(std::min<int64_t>(n, int64_t{ctx.n_sm} * std::max(1u, 1024 / threads)));
    partial = scratch.take<float>(static_cast<size_t>(rows * d));
    bwd_block<T><<<static_cast<unsigned>(rows), threads, 0, ctx.stream>>>(dx, partial, dy, x, rstd, w, n, width);
  } else {
    bwd_any<T><<<static_cast<unsigned>(n), any_threads(d), 0, ctx.stream>>>(dx, dy, x, rstd, w, d);
    MM_CUDA_LAUNCHED();
    rows = static_cast<int>(std::min<int64_t>(64, div_up(n, 16)));
    partial = scratch.take<float>(static_cast<size_t>(rows * d));
    dw_any<T><<<dim3(static_cast<unsigned>(div_up(d, 32)), static_cast<unsigned>(rows)), 32, 0, ctx.stream>>>(
        partial, dy, x, rstd, n, width);
  }
  MM_CUDA_LAUNCHED();
  if (dw != nullptr) add_column_sums(ctx, {dw, partial, rows}, width);
}

}  // namespace

void rmsnorm_fwd(const Context& ctx, DType t, void* y, float* rstd, const void* x, const void* w, float eps, int64_t n,
                 int64_t d) {
  if (n == 0) return;
  if (ctx.naive_norm) return naive_rmsnorm_fwd(ctx, t, y, rstd, x, w, eps, n, d);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    fwd<T>(ctx, static_cast<T*>(y), rstd, static_cast<const T*>(x), static_cast<const T*>(w), eps, n, d);
  });
}

void rmsnorm_bwd(const Context& ctx, DType t, void* dx, float* dw, const void* dy, const void* x, const float* rstd,
                 const void* w, int64_t n, int64_t d) {
  if (n == 0) return;
  if (ctx.naive_norm) return naive_rmsnorm_bwd(ctx, t, dx, dw, dy, x, rstd, w, n, d);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    bwd<T>(ctx, static_cast<T*>(dx), dw, static_cast<const T*>(dy), static_cast<const T*>(x), rstd,
           static_cast<const T*>(w), n, d);
  });
}

}  // namespace mm::cuda
