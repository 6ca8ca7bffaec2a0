// Second stage of a parameter gradient: each block of the first stage leaves one row of partial sums in ctx.scratch,
// and this adds the rows to the gradient in a fixed order. 32 columns a block, 32 warps over the rows: for 264 x 768
// partial sums 8 or 9 loads a thread, all in flight together.
#pragma once

#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {

struct ColumnSums {
  float* out;            // [d] +=
  const float* partial;  // [n, d]
  int n;
};

// blockIdx.y chooses between two sets of columns (weights of queries and of keys).
static __global__ void __launch_bounds__(1024) add_column_sums_kernel(ColumnSums a, ColumnSums b, int d) {
  __shared__ float tile[32][33];
  const ColumnSums s = blockIdx.y == 0 ? a : b;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, col = blockIdx.x * 32 + lane;
  float sum = 0;
  if (col < d) {
#pragma unroll 8
    for (int row = warp; row < s.n; row += 32) sum += s.partial[static_cast<int64_t>(row) * d + col];
  }
  tile[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(tile[lane][warp]);
  const int out_col = blockIdx.x * 32 + warp;
  if (lane == 0 && out_col < d) s.out[out_col] += sum;
}

inline void add_column_sums(const Context& ctx, const ColumnSums& a, int d) {
  add_column_sums_kernel<<<static_cast<unsigned>(div_up(d, 32)), 1024, 0, ctx.stream>>>(a, a, d);
  MM_CUDA_LAUNCHED();
}
inline void add_column_sums(const Context& ctx, const ColumnSums& a, const ColumnSums& b, int d) {
  add_column_sums_kernel<<<dim3(static_cast<unsigned>(div_up(d, 32)), 2), 1024, 0, ctx.stream>>>(a, b, d);
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
