// Vectors and copies of rows: dropout, add, copy, zero, cast, gather, scatter. Memory-bound; 8 elements a thread where
// the addresses allow 16-byte accesses, one where not.
//
// H100, bf16, 24576x768, % of a copy of 3.0 TB/s: dropout 30 us (85 %), add 41 us (92 %), gather 21 us (its source in
// L2); cast of 60M fp32 121 us (99 %).
//
// Dropout keeps the elements that base/rng.h and the other devices keep: Philox block i / 4 of (seed, stream) decides
// over elements i .. i + 3, whatever the type, alignment or grid.
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks(int64_t items) { return static_cast<unsigned>(div_up(items, kThreads)); }

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// Four elements a Philox block. Vector accesses need n % V == 0 only for the last thread, which falls back to single
// elements.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(T* x, float p, float keep, uint64_t seed, uint64_t stream, int64_t n, bool vectors) {
  const int64_t at = thread_index() * V;
  if (at >= n) return;
  float factor[V];
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    const uint4 r = philox(seed, stream, static_cast<uint64_t>(at + i) / 4);
    factor[i] = to_unit_float(r.x) < p ? 0.0f : keep, factor[i + 1] = to_unit_float(r.y) < p ? 0.0f : keep;
    factor[i + 2] = to_unit_float(r.z) < p ? 0.0f : keep, factor[i + 3] = to_unit_float(r.w) < p ? 0.0f : keep;
  }
  if (vectors && at + V <= n) {
    float v[V];
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < V; i++) v[i] *= factor[i];
    store(x + at, v);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (at + i < n) x[at + i] = from_float<T>(to_float(x[at + i]) * factor[i]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_kernel(T* y, const T* x, int64_t n, bool vectors) {
  const int64_t at = thread_index() * 8;
  if (at >= n) return;
  if (vectors && at + 8 <= n) {
    float a[8], b[8];
    load(a, y + at), load(b, x + at);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] += b[i];
    store(y + at, a);
  } else {
    for (int64_t i = at; i < min(n, at + 8); i++) y[i] = from_float<T>(to_float(y[i]) + to_float(x[i]));
  }
}

template <class To, class From>
__global__ void __launch_bounds__(kThreads) cast_kernel(To* y, const From* x, int64_t n, bool vectors) {
  const int64_t at = thread_index() * 8;
  if (at >= n) return;
  if (vectors && at + 8 <= n) {
    float v[8];
    load(v, x + at);
    store(y + at, v);
  } else {
    for (int64_t i = at; i < min(n, at + 8); i++) y[i] = from_float<To>(to_float(x[i]));
  }
}

// One warp a row. Row numbers below 0: gathered as zeros, not scattered.
template <class T, int V, bool kScatter>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(T* out, const T* x, const int32_t* rows, int64_t n, int64_t d) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (i >= n) return;
  const int64_t row = rows[i], from = kScatter ? i : row, to = kScatter ? row : i;
  if (kScatter && row < 0) return;
#pragma unroll 4
  for (int64_t c = threadIdx.x % 32 * V; c < d; c += 32 * V) {
    Raw<T, V> r = {};
    if (row >= 0) r.load(x + from * d + c);
    r.store(out + to * d + c);
  }
}

template <bool kScatter>
void copy_rows(const Context& ctx, DType t, void* out, const void* x, const int32_t* rows, int64_t n, int64_t d) {
  if (n == 0 || d == 0) return;
  const int warps = n <= ctx.n_sm ? 1 : kThreads / 32;
  const auto grid = static_cast<unsigned>(div_up(n, warps));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    auto* y = static_cast<T*>(out);
    const auto* from = static_cast<const T*>(x);
    if (d % per_16_bytes<T> == 0 && aligned({out, x}))
      copy_rows_kernel<T, per_16_bytes<T>, kScatter><<<grid, warps * 32, 0, ctx.stream>>>(y, from, rows, n, d);
    else copy_rows_kernel<T, 1, kScatter><<<grid, warps * 32, 0, ctx.stream>>>(y, from, rows, n, d);
  });
  MM_CUDA_LAUNCHED();
}

// One warp a row of out.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    scatter_add_kernel(T* out, const T* x, const int32_t* slot, int64_t n, int top_k, int64_t d) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (t >= n) return;
  for (int64_t c = threadIdx.x % 32 * V; c < d; c += 32 * V) {
    float sum[V] = {};
#pragma unroll 2
    for (int j = 0; j < top_k; j++) {
      const int64_t row = slot[t * top_k + j];
      float v[V];
      load(v, x + row * d + c);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += v[i];
    }
    store(out + t * d + c, sum);
  }
}

}  // namespace

void dropout(const Context& ctx, DType t, void* x, float p, uint64_t seed, uint64_t stream, int64_t n) {
  if (n == 0 || p <= 0) return;
  const auto keep = static_cast<float>(1.0 / (1.0 - p));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    dropout_kernel<T, 8>
        <<<blocks(div_up(n, 8)), kThreads, 0, ctx.stream>>>(static_cast<T*>(x), p, keep, seed, stream, n, aligned({x}));
  });
  MM_CUDA_LAUNCHED();
}

void add(const Context& ctx, DType t, void* y, const void* x, int64_t n) {
  if (n == 0) return;
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    add_kernel<<<blocks(div_up(n, 8)), kThreads, 0, ctx.stream>>>(static_cast<T*>(y), static_cast<const T*>(x), n,
                                                                  aligned({y, x}));
  });
  MM_CUDA_LAUNCHED();
}

void copy(const Context& ctx, DType t, void* y, const void* x, int64_t n) {
  if (n == 0) return;
  const size_t bytes = static_cast<size_t>(n) * (t == DType::f32 ? 4 : 2);
  MM_CUDA_CHECK(cudaMemcpyAsync(y, x, bytes, cudaMemcpyDeviceToDevice, ctx.stream));
}

void zero(const Context& ctx, void* x, size_t bytes) {
  if (bytes == 0) return;
  MM_CUDA_CHECK(cudaMemsetAsync(x, 0, bytes, ctx.stream));
}

void cast(const Context& ctx, DType to, void* y, DType from, const void* x, int64_t n) {
  if (n == 0) return;
  if (to == from) return copy(ctx, to, y, x, n);
  dispatch(to, [&](auto to_tag) {
    dispatch(from, [&](auto from_tag) {
      using To = decltype(to_tag);
      using From = decltype(from_tag);
      if constexpr (!std::is_same_v<To, From>) {
        cast_kernel<<<blocks(div_up(n, 8)), kThreads, 0, ctx.stream>>>(static_cast<To*>(y), static_cast<const From*>(x),
                                                                       n, aligned({y, x}));
      }
    });
  });
  MM_CUDA_LAUNCHED();
}

void gather_rows(const Context& ctx, DType t, void* out, const void* x, const int32_t* rows, int64_t n, int64_t d) {
  copy_rows<false>(ctx, t, out, x, rows, n, d);
}

void scatter_rows(const Context& ctx, DType t, void* out, const void* x, const int32_t* rows, int64_t n, int64_t d) {
  copy_rows<true>(ctx, t, out, x, rows, n, d);
}

void scatter_add(const Context& ctx, DType t, void* out, const void* x, const int32_t* slot, int64_t n, int top_k,
                 int64_t d) {
  if (n == 0 || d == 0) return;
  const int warps = n <= ctx.n_sm ? 1 : kThreads / 32;
  const auto grid = static_cast<unsigned>(div_up(n, warps));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    auto* y = static_cast<T*>(out);
    const auto* from = static_cast<const T*>(x);
    if (d % per_16_bytes<T> == 0 && aligned({out, x}))
      scatter_add_kernel<T, per_16_bytes<T>><<<grid, warps * 32, 0, ctx.stream>>>(y, from, slot, n, top_k, d);
    else scatter_add_kernel<T, 1><<<grid, warps * 32, 0, ctx.stream>>>(y, from, slot, n, top_k, d);
  });
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
