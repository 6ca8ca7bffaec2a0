// For .cu files and the device layer: a failed CUDA call becomes an Error that names it.
#pragma once

#include <cuda_runtime.h>

#include "base/error.h"

namespace mm::cuda {

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw Error(std::string("CUDA: ") + what, "success", cudaGetErrorString(status),
              std::string("at ") + file + ":" + std::to_string(line));
}

}  // namespace mm::cuda

#define MM_CUDA_CHECK(call) ::mm::cuda::check((call), #call, __FILE__, __LINE__)
#define MM_CUDA_LAUNCHED() ::mm::cuda::check(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)
