// Blocks of a cluster (sm_90 and up; below it a cluster is one block): they wait for each other and write into each
// other's shared memory. All threads of all blocks arrive, then wait.
#pragma once

#include "kernels/cuda/attention_mma.cuh"

namespace mm::cuda {

__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// *p = x in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void cluster_store(float* p, int rank, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
#else
  *p = x;
#endif
}

}  // namespace mm::cuda
