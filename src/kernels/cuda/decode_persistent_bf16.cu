// The kernels of the persistent decode step for bf16 weights (a file each: they take long to compile).
#include "kernels/cuda/decode_persistent_kernel.cuh"

namespace mm::cuda::persistent {

Kernel kernel_of_bf16(const Params& p) { return for_shape<WeightFormat::bf16>(p); }

}  // namespace mm::cuda::persistent
