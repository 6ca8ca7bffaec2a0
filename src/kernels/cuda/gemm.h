// Matrix products by cuBLASLt or by our own Hopper kernel. The library is opened at run time (a program without a GPU
// needs none), plans are kept by shape, and the algorithm of a new shape is chosen by timing the library's candidates
// and our own once; the choice is kept on disk ($XDG_CACHE_HOME/minimind), so that the next run computes with the same
// bits.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

// Row-major D[m, n] = op(A)[m, k] op(B)[k, n] (+ C). trans_a: A is stored [k, m]; trans_b: B is stored [n, k].
struct GemmShape {
  int64_t m = 0, n = 0, k = 0, lda = 0, ldb = 0, ldd = 0, ldc = 0;
  bool trans_a = false, trans_b = false, add_c = false;
  bool aligned = true;                        // set by run(): addresses and rows are multiples of 16 bytes
  DType in = DType::bf16, out = DType::bf16;  // C is of type out
  auto operator<=>(const GemmShape&) const = default;
};

class Gemm {
 public:
  explicit Gemm(const Context& ctx);
  ~Gemm();
  // d = a b (+ c; c may be d). Sums in fp32. An unseen shape outside of graph capture is timed first.
  void run(GemmShape shape, void* d, const void* a, const void* b, const void* c);
  static size_t workspace_bytes();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm::cuda
