// y [m, n] = norm(x) [m, k] w^T (+ residual) for the 33 to 128 tokens of a decode step on a Hopper (TMA, wgmma), with
// the RMSNorm before and the residual behind in the same launch:
//
//   tile      64 weight rows, the rows of wgmma m64nNk16, and N tokens, its columns (32 or 64; those behind the last
//             arrive as zeros)
//   k         all of it in one block where w's and x's tile fit its shared memory, else split over the P blocks of a
//             cluster; there is no ring: all copies are issued at once
//   overlap   the weights are copied, and multiplied by the norm's weight (one rounding), before the kernel waits for
//             the one before it; behind the wait are x, the products and the sums
//   norm      sums of squares of x gather while the tensor cores work; the sums are multiplied by 1 / rms at the end
//   sums      a block leaves its part in shared memory as [token][row]; then it finishes the tokens that are its share,
//             adding the parts of the cluster in their order
//
// A row's bits do not depend on the other rows.
#include "kernels/cuda/hopper_gemm_ops.cuh"
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace mm::cuda {
namespace {

constexpr int n_thread = 128, tile_rows = 64, block_k = 128, max_steps = 16, max_tokens = 128, max_shared = 224 << 10;
constexpr int w_step = tile_rows * block_k * 2;
constexpr int padded = tile_rows + 4;  // floats of a token's sums: no bank conflicts

struct WideParams {
  CUtensorMap w, x;  // [k / 64][rows][64]
  void* y;
  const void *residual, *norm;
  float eps;
  int m, n, k, tiles;
};

constexpr int shared_bytes(int columns, int steps) {
  return 1024 + std::max(steps * (w_step + columns * block_k * 2), columns * padded * 4);
}

template <class T>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  using P = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  const P d = __hmul2(*reinterpret_cast<const P*>(&a), *reinterpret_cast<const P*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// Blocks: P parts of k, then tiles of rows, then of tokens.
template <class T, int N, int P>
__global__ void __launch_bounds__(n_thread) wide_kernel(const __grid_constant__ WideParams a) {
#if defined(MM_SM90A)
  using namespace hopper;
  constexpr int x_step = N * block_k * 2, chunk = N / 8 / P + (N / 8 % P != 0 ? 1 : 0);
  extern __shared__ unsigned char memory[];
  __shared__ uint64_t w_full[max_steps], x_full[max_steps];
  __shared__ float squares[N], factor[N];
  const int thread = static_cast<int>(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x) % P, tile = static_cast<int>(blockIdx.x) / P;
  const int row0 = tile % a.tiles * tile_rows, first_token = tile / a.tiles * N, tokens = min(N, a.m - first_token);
  const int all_steps = (a.k + block_k - 1) / block_k, begin = all_steps * part / P,
            steps = all_steps * (part + 1) / P - begin;
  unsigned char* const w_at = memory + ((1024 - (smem_address(memory) & 1023)) & 1023);
  unsigned char* const x_at = w_at + steps * w_step;
  const bool loads = warp == 0 && elect_one();
  if (loads) {
    for (int i = 0; i < steps; i++) mbarrier_init(&w_full[i], 1), mbarrier_init(&x_full[i], 1);
    mbarrier_init_fence();
    for (int i = 0; i < steps; i++) {
      mbarrier_arrive_expect(&w_full[i], w_step);
      tma_load_3d(w_at + i * w_step, &a.w, &w_full[i], 0, row0, (begin + i) * 2);
      mbarrier_arrive_expect(&x_full[i], x_step);
    }
    prefetch_tensor_map(&a.x);
  }
  __syncthreads();
  let_next_begin();
  if (a.norm != nullptr) {
    // A thread's chunks of 16 bytes lie in rows that are equal modulo 8, so they are the same columns of 64.
    const int column = ((thread ^ thread / 8) & 7) * 8;
    for (int i = 0; i < steps; i++) {
      uint4 by[2] = {};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int at = (begin + i) * block_k + h * 64 + column;
        if (at < a.k) by[h] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(a.norm) + at));
      }
      mbarrier_wait(&w_full[i], 0);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        uint4* const p = reinterpret_cast<uint4*>(w_at + i * w_step) + thread + j * n_thread;
        const uint4 w = *p, b = by[j / 4];
        *p = make_uint4(multiply<T>(w.x, b.x), multiply<T>(w.y, b.y), multiply<T>(w.z, b.z), multiply<T>(w.w, b.w));
      }
    }
    fence_async_proxy();
    __syncthreads();
  }
  wait_for_previous();
  if (loads) {
    for (int i = 0; i < steps; i++)
      tma_load_3d(x_at + i * x_step, &a.x, &x_full[i], 0, first_token, (begin + i) * 2);
  }
  __syncwarp();
  // This block's share of the output: tokens from token0 on, in items of 4 neighbours.
  constexpr int per_token = tile_rows / 4;
  const int token0 = tokens * part / P, share = tokens * (part + 1) / P - token0, items = share * per_token;
  const auto is_item = [&](int i) { return i < items && row0 + i % per_token * 4 < a.n; };
  const auto item_at = [&](int i) {
    return static_cast<int64_t>(first_token + token0 + i / per_token) * a.n + row0 + i % per_token * 4;
  };
  uint2 add[chunk] = {};
  if (a.residual != nullptr) {
#pragma unroll
    for (int c = 0; c < chunk; c++) {
      const int i = thread + c * n_thread;
      if (is_item(i)) add[c] = *reinterpret_cast<const uint2*>(static_cast<const T*>(a.residual) + item_at(i));
    }
  }

  float d[N / 2];
  const uint64_t w_desc = wgmma_descriptor<128>(smem_address(w_at), 0, 1024),
                 x_desc = wgmma_descriptor<128>(smem_address(x_at), 0, 1024);
  for (int i = 0; i < steps; i++) {
    mbarrier_wait(&w_full[i], 0);
    mbarrier_wait(&x_full[i], 0);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 8; j++)
      wgmma_ss<std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat16, __half>, N>(
          d, w_desc + i * (w_step / 16) + j / 4 * (w_step / 32) + 2 * (j % 4),
          x_desc + i * (x_step / 16) + j / 4 * (x_step / 32) + 2 * (j % 4), i > 0 || j > 0);
    wgmma_commit();
  }
  if (a.norm != nullptr) {
    float s[N / 16] = {};
#pragma unroll 2
    for (int i = 0; i < steps; i++) {
      uint4 v[N / 8];
#pragma unroll
      for (int r = 0; r < N / 8; r++) v[r] = *(reinterpret_cast<const uint4*>(x_at + i * x_step) + r * n_thread + thread);
#pragma unroll
      for (int r = 0; r < N / 8; r++) {
        const uint32_t words[4] = {v[r].x, v[r].y, v[r].z, v[r].w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 f = unpack2<T>(words[e]);
          s[r % (N / 16)] += f.x * f.x + f.y * f.y;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < N / 16; r++) {
      const float all = warp_sum<8>(s[r]);
      if (thread % 8 == 0) squares[16 * r + thread / 8] = all;
    }
  }
  wgmma_wait<0>();
  wgmma_pin(d);
  __syncthreads();  // w and x have been read
  float* const sums = reinterpret_cast<float*>(w_at);
#pragma unroll
  for (int i = 0; i < N / 2; i++)
    sums[(8 * (i / 4) + 2 * (lane % 4) + i % 2) * padded + warp * 16 + lane / 4 + 8 * (i / 2 % 2)] = d[i];
  if constexpr (P > 1) cluster_sync();
  else __syncthreads();

  float4 v[chunk][P];
  if (a.norm != nullptr && thread < share) {
    float s = 0.0f;
#pragma unroll
    for (int q = 0; q < P; q++)
      s += P > 1 ? cluster_load(smem_address(squares + token0 + thread), q) : squares[token0 + thread];
    factor[thread] = rsqrtf(s / static_cast<float>(a.k) + a.eps);
  }
#pragma unroll
  for (int c = 0; c < chunk; c++) {
    const int i = max(min(thread + c * n_thread, items - 1), 0);
    const float* at = sums + (token0 + i / per_token) * padded + i % per_token * 4;
#pragma unroll
    for (int q = 0; q < P; q++)
      v[c][q] = P > 1 ? cluster_load4(smem_address(at), q) : *reinterpret_cast<const float4*>(at);
  }
#pragma unroll
  for (int c = 0; c < chunk; c++) {
#pragma unroll
    for (int q = 1; q < P; q++) {
      const float4 from = v[c][q], to = v[c][0];
      v[c][0] = make_float4(to.x + from.x, to.y + from.y, to.z + from.z, to.w + from.w);
    }
  }
  __syncthreads();
  if constexpr (P > 1) cluster_arrive();
#pragma unroll
  for (int c = 0; c < chunk; c++) {
    const int i = thread + c * n_thread;
    if (!is_item(i)) continue;
    const float r = a.norm != nullptr ? factor[i / per_token] : 1.0f;
    float4 out = v[c][0];
    out = make_float4(out.x * r, out.y * r, out.z * r, out.w * r);
    if (a.residual != nullptr) {
      const float2 lo = unpack2<T>(add[c].x), hi = unpack2<T>(add[c].y);
      out = make_float4(out.x + lo.x, out.y + lo.y, out.z + hi.x, out.w + hi.y);
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(a.y) + item_at(i)) =
        make_uint2(pack2<T>(out.x, out.y), pack2<T>(out.z, out.w));
  }
  __syncwarp();
  if constexpr (P > 1) cluster_wait();  // nobody leaves while others read its sums
#endif
}

// [rows, k] T as [k / 64][rows][64], in boxes of 2 x box_rows x 64.
CUtensorMap rows_map(DType t, const void* p, int64_t rows, int64_t k, int box_rows) {
  const cuuint64_t size[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(k / 64)},
                   bytes[2] = {static_cast<cuuint64_t>(2 * k), 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), block_k / 64}, step[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult r = encode_tiled()(
      &map, t == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(p), size, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled", "refused", __FILE__, __LINE__);
  return map;
}

// How a product is spread over the GPU; columns 0: it does not fit one wave of blocks.
struct Spread {
  int columns = 0, parts = 0, steps = 0;  // steps: the most of a block
};
Spread spread_of(const Context& ctx, const FewLinear& a) {
  const int64_t steps = div_up(a.k, block_k);
  for (const int columns : {32, 64}) {
    for (int64_t parts = 1; parts <= std::min<int64_t>(4, steps); parts++) {
      const int most = static_cast<int>(std::min<int64_t>(div_up(steps, parts), max_steps + 1));
      if (most <= max_steps && shared_bytes(columns, most) <= max_shared &&
          div_up(a.n, tile_rows) * div_up(a.m, columns) * parts <= ctx.n_sm)
        return {columns, static_cast<int>(parts), most};
    }
  }
  return {};
}

template <class T, int N, int P>
void launch_wide(const Context& ctx, const WideParams& p, int steps) {
  const auto kernel = wide_kernel<T, N, P>;
  static const cudaError_t once = [&] {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    return e != cudaSuccess ? e : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
  }();
  MM_CUDA_CHECK(once);
  const auto blocks = static_cast<unsigned>(P * p.tiles * static_cast<int>(div_up(p.m, N)));
  launch_overlapped(ctx, kernel, dim3(blocks), n_thread, static_cast<size_t>(shared_bytes(N, steps)), P, p);
}

void launch_spread(const Context& ctx, DType t, const FewLinear& a, const Spread& s) {
  const WideParams p = {rows_map(t, a.w, a.n, a.k, tile_rows),
                        rows_map(t, a.x, a.m, a.k, s.columns),
                        a.y,
                        a.residual,
                        a.norm,
                        a.eps,
                        static_cast<int>(a.m),
                        static_cast<int>(a.n),
                        static_cast<int>(a.k),
                        static_cast<int>(div_up(a.n, tile_rows))};
  const auto parts = [&]<class T, int N>(T, std::integral_constant<int, N>) {
    switch (s.parts) {
      case 1: return launch_wide<T, N, 1>(ctx, p, s.steps);
      case 2: return launch_wide<T, N, 2>(ctx, p, s.steps);
      case 3: return launch_wide<T, N, 3>(ctx, p, s.steps);
      default: return launch_wide<T, N, 4>(ctx, p, s.steps);
    }
  };
  const auto width = [&]<class T>(T tag) {
    if (s.columns == 32) parts(tag, std::integral_constant<int, 32>{});
    else parts(tag, std::integral_constant<int, 64>{});
  };
  if (t == DType::bf16) width(bf16{});
  else width(f16{});
}

}  // namespace

bool linear_wide_fits(const Context& ctx, DType t, const FewLinear& a) {
  if (ctx.arch != 90 || t == DType::f32 || a.scales != nullptr || a.swiglu || a.m < 1 || a.m > max_tokens) return false;
  if (a.n % 4 != 0 || a.k % 64 != 0 || a.n >= (int64_t{1} << 20) || a.k >= (int64_t{1} << 20)) return false;
  return aligned({a.x, a.w, a.norm, a.y, a.residual}) && spread_of(ctx, a).columns != 0;
}

void linear_wide(const Context& ctx, DType t, const FewLinear& a) {
  if (a.m == 0 || a.n == 0) return;
  if (!linear_wide_fits(ctx, t, a)) fail("linear_wide", "what it does not take", __FILE__, __LINE__);
  launch_spread(ctx, t, a, spread_of(ctx, a));
}

}  // namespace mm::cuda
