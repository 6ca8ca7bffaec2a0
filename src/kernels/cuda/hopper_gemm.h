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
  store,       // out = product (bf16); of a wgrad: out += product (fp32)
  residual,    // out = residual + product, rounded once; residual may be out
  swiglu,      // fwd, n = 2 f: out = product (null: not wanted), act[m, f] = silu(out[:, :f]) * out[:, f:]
  swiglu_bwd,  // dgrad, n = f: with dact = product (rounded to bf16), gate_up = residual [m, 2 f] (may be out):
               // out[m, 2 f] = gradient of gate_up, act[m, f] = silu(gate) * up (null: not wanted)
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
  int tile_n = 0;  // columns of a tile, 256, 192 or 128 (swiglu: 256, swiglu_bwd: 192); 0: chosen by size
};

// Is the device a Hopper, and are sizes, strides and addresses such as the kernel can take? Every address a multiple of
// 16 bytes, every stride (lda, ldb, ldo, ldr, stride) and n of 8; besides, fwd: k of 8, swiglu: n of 16; dgrad: k of 8,
// n of 64; wgrad: m and n of 64 (k, the rows, may be anything). m, n, k at least 1 and less than 2^30.
bool hopper_gemm_fits(const Context& ctx, const HopperGemm& g);
void hopper_gemm(const Context& ctx, const HopperGemm& g);

}  // namespace mm::cuda
