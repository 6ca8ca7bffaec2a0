// The backends that the kernel tests loop over.
#include "kernels/cases/check_op.h"
#include "kernels/cpu/simd_tables.h"
#ifdef MM_CUDA
#include "kernels/cases/cuda_backend.h"
#endif

namespace mm {

const std::vector<cases::Backend>& cases::cpu_backends() {
  static const std::vector<Backend> list = [] {
    std::vector<Backend> v;
    for (const int threads : {1, 2, 3, 4})
      v.push_back({std::string("cpu/") + isa_name(selected_isa()), cpu_kernels(), threads});
#ifdef MM_CUDA
    if (const KernelTable* gpu = cuda_kernels(); gpu != nullptr)
      v.push_back({.name = "cuda", .kernels = *gpu, .float_squares = true});
#endif
    return v;
  }();
  return list;
}

const std::vector<cases::Backend>& cases::cpu_and_row_backends() {
  static const std::vector<Backend> list = [] {
    std::vector<Backend> v = cpu_backends();
    for (const auto& [isa, simd] : simd_tables()) {
      Backend b{std::string("rows/") + isa_name(isa), cpu_kernels()};
      b.kernels.rmsnorm_fwd = simd->rmsnorm_fwd;
      b.kernels.rmsnorm_bwd = simd->rmsnorm_bwd;
      b.kernels.swiglu_fwd = simd->swiglu_fwd;
      b.kernels.swiglu_bwd = simd->swiglu_bwd;
      b.kernels.logprob_fwd = simd->logprob_fwd;
      b.kernels.logprob_bwd = simd->logprob_bwd;
      b.kernels.sum_sq = simd->sum_sq;
      v.push_back(std::move(b));
    }
    return v;
  }();
  return list;
}

}  // namespace mm
