// Launches that overlap the end of the kernel before them (programmatic dependent launch, sm_90 and up; captured graphs
// keep it). The kernel may begin while its predecessor runs: what the predecessor writes may be read, and anything that
// it may still read be written, only behind wait_for_previous(). Every thread calls it.
#pragma once

#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin as soon as all blocks have said so and leave room.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class... P, class... A>
void launch_overlapped(const Context& ctx, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
                       unsigned cluster, A&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream;
  config.attrs = attributes;
  if (ctx.arch >= 90) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster, size.val.clusterDim.y = size.val.clusterDim.z = 1;
  }
  MM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

}  // namespace mm::cuda
