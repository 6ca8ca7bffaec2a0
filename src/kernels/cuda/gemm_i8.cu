// y [m, n] = x [m, k] w^T (+ residual) with int8 weights in groups of 32 along k, each with one f16 scale.
//
// Few tokens: linear_few.cu. Many, bf16 on Hopper: the matrix becomes bf16 in scratch memory for hopper_gemm (n k 2
// bytes written and read more, in the L2 cache; H100, 6400 x 768: 512 tokens 20 us, 4,096 68 us, with bf16 weights 54).
// plain_linear: fp32, or addresses that the others do not take.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/hopper_gemm.h"
#include "kernels/cuda/infer_kernels.h"

namespace mm::cuda {
namespace {

constexpr int group_size = static_cast<int>(weight_group);
static_assert(group_size == 32);

// A warp a group.
__global__ void __launch_bounds__(256) quantize_kernel(int8_t* data, f16* scales, const float* w, int64_t n_group) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (group >= n_group) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float x = w[group * group_size + lane];
  const f16 scale = __float2half_rn(warp_max(fabsf(x)) / 127.0f);
  const float s = __half2float(scale);  // what the products will use
  const int q = s > 0.0f && s < INFINITY ? max(-127, min(127, __float2int_rn(x / s))) : 0;
  data[group * group_size + lane] = static_cast<int8_t>(q);
  if (lane == 0) scales[group] = scale;
}

template <class T>
struct Linear {
  T* y;
  const T *x, *residual;
  const int8_t* w;
  const f16* scales;
  int m, n, k;
};

constexpr int n_warp = 8;
constexpr int64_t most_few = 700'000;  // outputs up to which linear_few is faster than widening the matrix first

// A warp a weight row and 8 tokens.
template <class T>
__global__ void __launch_bounds__(n_warp * 32) plain_linear(const __grid_constant__ Linear<T> a) {
  constexpr int tokens = 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warp + threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.y) * tokens;
  if (row >= a.n) return;
  float sum[tokens] = {};
  for (int i = lane; i < a.k; i += 32) {
    const float w = static_cast<float>(a.w[row * a.k + i]) * __half2float(a.scales[row * (a.k / 32) + i / 32]);
#pragma unroll
    for (int t = 0; t < tokens; t++)
      sum[t] += w * to_float(a.x[static_cast<int64_t>(min(first + t, a.m - 1)) * a.k + i]);
  }
#pragma unroll
  for (int t = 0; t < tokens; t++) {
    sum[t] = warp_sum(sum[t]);
    if (lane != 0 || first + t >= a.m) continue;
    const int64_t at = static_cast<int64_t>(first + t) * a.n + row;
    a.y[at] = from_float<T>(sum[t] + (a.residual != nullptr ? to_float(a.residual[at]) : 0.0f));
  }
}

// data [n, k] as bf16.
__global__ void __launch_bounds__(256) widen_kernel(bf16* out, const int8_t* data, const f16* scales, int64_t n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 16;
  if (i >= n) return;
  const uint4 u = *reinterpret_cast<const uint4*>(data + i);
  const float scale = __half2float(scales[i / group_size]);
  const uint32_t w[4] = {u.x, u.y, u.z, u.w};
  float x[16];
#pragma unroll
  for (int j = 0; j < 16; j++) x[j] = static_cast<float>(static_cast<int8_t>(w[j / 4] >> (j % 4 * 8))) * scale;
  store(out + i, x);
}

// Many tokens: the matrix becomes bf16 in scratch memory for the kernel that has the highest rate. False where that
// does not take it.
bool linear_widened(const Context& ctx, const Linear<bf16>& a) {
  HopperGemm g = {.a = a.x, .b = ctx.scratch, .out = a.y, .m = a.m, .n = a.n, .k = a.k, .residual = a.residual};
  if (a.residual != nullptr) g.epilogue = GemmEpilogue::residual;
  const int64_t size = int64_t{a.n} * a.k;
  if (static_cast<size_t>(size) * sizeof(bf16) > ctx.scratch_bytes || !hopper_gemm_fits(ctx, g)) return false;
  widen_kernel<<<static_cast<unsigned>(div_up(size, 256 * 16)), 256, 0, ctx.stream>>>(static_cast<bf16*>(ctx.scratch),
                                                                                      a.w, a.scales, size);
  MM_CUDA_LAUNCHED();
  hopper_gemm(ctx, g);
  return true;
}

}  // namespace

void quantize_i8(const Context& ctx, int8_t* data, void* scales, const float* w, int64_t n, int64_t k) {
  const int64_t groups = n * k / group_size;
  if (groups == 0) return;
  quantize_kernel<<<static_cast<unsigned>(div_up(groups, 8)), 256, 0, ctx.stream>>>(data, static_cast<f16*>(scales), w,
                                                                                    groups);
  MM_CUDA_LAUNCHED();
}

void linear_i8(const Context& ctx, DType t, void* y, const void* x, const int8_t* data, const void* scales,
               const void* residual, int64_t m, int64_t n, int64_t k) {
  if (m == 0 || n == 0) return;
  const FewLinear few = {.y = y, .x = x, .w = data, .scales = scales, .residual = residual, .m = m, .n = n, .k = k};
  dispatch(t, [&]<class T>(T) {
    const Linear<T> a = {static_cast<T*>(y),
                         static_cast<const T*>(x),
                         static_cast<const T*>(residual),
                         data,
                         static_cast<const f16*>(scales),
                         static_cast<int>(m),
                         static_cast<int>(n),
                         static_cast<int>(k)};
    if constexpr (std::is_same_v<T, bf16>) {
      if (m * n > most_few && linear_widened(ctx, a)) return;
    }
    if (linear_few_fits(t, few)) return linear_few(ctx, t, few);
    plain_linear<T><<<dim3(static_cast<unsigned>(div_up(n, n_warp)), static_cast<unsigned>(div_up(m, 8))), n_warp * 32,
                      0, ctx.stream>>>(a);
    MM_CUDA_LAUNCHED();
  });
}

}  // namespace mm::cuda
