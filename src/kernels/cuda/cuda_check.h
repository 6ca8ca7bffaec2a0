// For .cu files and the device layer: a failed CUDA call becomes an Error that names it. Without base/error.h, whose
// fmt nvcc does not compile.
#pragma once

#include <cuda_runtime.h>

namespace mm::cuda {

[[noreturn]] void fail(const char* what, const char* reason, const char* file, int line);  // throws mm::Error

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status != cudaSuccess) fail(what, cudaGetErrorString(status), file, line);
}

}  // namespace mm::cuda

#define MM_CUDA_CHECK(call) ::mm::cuda::check((call), #call, __FILE__, __LINE__)
#define MM_CUDA_LAUNCHED() ::mm::cuda::check(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)
