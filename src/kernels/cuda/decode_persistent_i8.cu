// The kernels of the persistent decode step for int8 weights (a file each: they take long to compile).
#include "kernels/cuda/decode_persistent_kernel.cuh"

namespace mm::cuda::persistent {

Kernel kernel_of_i8(const Params& p) { return for_shape<WeightFormat::i8>(p); }

}  // namespace mm::cuda::persistent
