// bf16 matrix products by a kernel of our own for Hopper (TMA + wgmma): dense ones, as an alternative to cuBLASLt with
// epilogues that it lacks, and the grouped ones of a mixture of experts.
#pragma once

#include <cstdint>

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

enum class GemmLayout {
  fwd,    // out[m, n] = a[m, k] b[n, k]^T
  dgrad,  // out[m, n] = a[m, k] b[k, n]
  wgrad,  // out[m, n] (fp32, +=) = a[k, m]^T b[k, n]
};
enum class GemmEpilogue {
  store,     // out = product (bf16); of a wgrad: out += product (fp32)
  residual,  // out = residual + product, rounded once; residual may be out
  swiglu,    // fwd, n = 2 f: out = product (null: not wanted), act[m, f] = silu(out[:, :f]) * out[:, f:]
};

struct HopperGemm {
  GemmLayout layout = GemmLayout::fwd;
  GemmEpilogue epilogue = GemmEpilogue::store;
  const void* a = nullptr;
  const void* b = nullptr;
  void* out = nullptr;
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldo = 0;  // 0: packed
  const void* residual = nullptr;
  int64_t ldr = 0;
  void* act = nullptr;  // [m, f]
  // Grouped: the rows of the activations (m of fwd and dgrad, k of wgrad: then only bounds of their number) belong to
  // experts, expert e has rows [offset[e], offset[e + 1]); its weights (wgrad: its out) start `stride` elements after
  // those of e - 1.
  const int32_t* offset = nullptr;
  int n_expert = 1;
  int64_t stride = 0;
  int tile_n = 0;      // columns of a tile, 256, 192 or 128; 0: chosen by size
  int ahead = 8, out_ahead = 1, pdl = 1;
  bool defer = true;   // false: every tile is stored before the next is begun (slower, for comparison)
};

// Is the device a Hopper, and are sizes, strides and addresses such as TMA can take (multiples of 16 bytes)?
bool hopper_gemm_fits(const Context& ctx, const HopperGemm& g);
void hopper_gemm(const Context& ctx, const HopperGemm& g);

}  // namespace mm::cuda
