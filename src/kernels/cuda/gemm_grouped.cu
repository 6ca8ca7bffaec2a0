// Products of a mixture of experts: entry points and choice of kernel.
//   bf16 on a Hopper: hopper_gemm (TMA + wgmma, persistent)
//   bf16, f16, sizes multiples of 8: grouped_mma (mma.sync)
//   otherwise: grouped_plain (FFMA)
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/gemm_grouped.h"
#include "kernels/cuda/hopper_gemm.h"

namespace mm::cuda {

namespace {

void grouped(const Context& ctx, DType t, const GroupedGemm& g) {
  if (g.max_rows < 1 || g.n < 1 || g.k < 1 || g.n_expert < 1) return;
  if (t == DType::bf16) {
    HopperGemm h;
    h.layout = g.layout;
    h.a = g.a, h.b = g.b, h.out = g.out;
    h.offset = g.offset, h.n_expert = g.n_expert, h.stride = g.stride;
    switch (g.layout) {
      case GemmLayout::fwd: h.m = g.max_rows, h.n = g.n, h.k = g.k; break;
      case GemmLayout::dgrad: h.m = g.max_rows, h.n = g.k, h.k = g.n; break;
      case GemmLayout::wgrad: h.m = g.n, h.n = g.k, h.k = g.max_rows; break;
    }
    if (hopper_gemm_fits(ctx, h)) return hopper_gemm(ctx, h);
  }
  const bool eights = g.n % 8 == 0 && g.k % 8 == 0 && g.stride % 8 == 0 && aligned({g.a, g.b, g.out});
  if (t != DType::f32 && eights) grouped_mma(ctx, t, g);
  else grouped_plain(ctx, t, g);
}

}  // namespace

void grouped_fwd(const Context& ctx, DType t, void* y, const void* x, const void* w, int64_t stride,
                 const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert) {
  grouped(ctx, t, {GemmLayout::fwd, x, w, y, offset, max_rows, stride, n, k, n_expert});
}
void grouped_dgrad(const Context& ctx, DType t, void* dx, const void* dy, const void* w, int64_t stride,
                   const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert) {
  grouped(ctx, t, {GemmLayout::dgrad, dy, w, dx, offset, max_rows, stride, n, k, n_expert});
}
void grouped_wgrad(const Context& ctx, DType t, float* dw, int64_t stride, const void* dy, const void* x,
                   const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert) {
  grouped(ctx, t, {GemmLayout::wgrad, dy, x, dw, offset, max_rows, stride, n, k, n_expert});
}

}  // namespace mm::cuda
