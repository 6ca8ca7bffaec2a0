// Tensor maps of the TMA, made on the host.
#pragma once

#include <cuda.h>

#include "kernels/cuda/cuda_check.h"

namespace mm::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime, so that the program needs no libcuda to start.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    MM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result));
#else
    MM_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &result));
#endif
    if (f == nullptr) fail("cuTensorMapEncodeTiled", "the driver has none", __FILE__, __LINE__);
    return reinterpret_cast<EncodeTiled>(f);
  }();
  return function;
}

}  // namespace mm::cuda
