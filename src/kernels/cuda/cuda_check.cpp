#include "kernels/cuda/cuda_check.h"

#include <string>

#include "base/error.h"

namespace mm::cuda {

void fail(const char* what, const char* reason, const char* file, int line) {
  throw Error(std::string("CUDA: ") + what, "success", reason, std::string("at ") + file + ":" + std::to_string(line));
}

}  // namespace mm::cuda
