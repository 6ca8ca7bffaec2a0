// RMSNorm as one kernel for each operation of the formula, the way an eager framework runs it: what the fused kernels
// of norm.cu are compared with (ctx.naive_norm).
#pragma once

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

void naive_rmsnorm_fwd(const Context& ctx, DType t, void* y, float* rstd, const void* x, const void* w, float eps,
                       int64_t n, int64_t d);
void naive_rmsnorm_bwd(const Context& ctx, DType t, void* dx, float* dw, const void* dy, const void* x,
                       const float* rstd, const void* w, int64_t n, int64_t d);

}  // namespace mm::cuda
