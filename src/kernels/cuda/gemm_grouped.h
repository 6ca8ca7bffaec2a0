// The portable kernels behind grouped_fwd / dgrad / wgrad of cuda_kernels.h.
#pragma once

#include "kernels/cuda/hopper_gemm.h"

namespace mm::cuda {

struct GroupedGemm {
  GemmLayout layout = GemmLayout::fwd;
  const void* a = nullptr;  // fwd: x, dgrad: dy, wgrad: dy
  const void* b = nullptr;  // fwd, dgrad: w, wgrad: x
  void* out = nullptr;      // T, wgrad: fp32
  const int32_t* offset = nullptr;
  int64_t max_rows = 0, stride = 0;
  int64_t n = 0, k = 0;  // the weights are [n, k]
  int n_expert = 1;
};

// Tensor cores (sm_80 up); n, k, stride multiples of 8, addresses of 16 bytes, T = bf16 or f16.
void grouped_mma(const Context& ctx, DType t, const GroupedGemm& g);
// Any type and size.
void grouped_plain(const Context& ctx, DType t, const GroupedGemm& g);

}  // namespace mm::cuda
