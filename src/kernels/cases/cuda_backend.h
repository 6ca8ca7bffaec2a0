// The CUDA kernels as a backend of the kernel tests.
#pragma once

#include "kernels/kernel_table.h"

namespace mm::cases {

// Functions on host memory that copy their arrays to the GPU, run the fp32 kernel there and copy the outputs back; null
// where no GPU is usable.
const KernelTable* cuda_kernels();

}  // namespace mm::cases
