// What the Hopper GEMM needs of the instruction set beyond hopper.cuh: products 192 and 256 columns wide, TMA loads
// that write to both blocks of a cluster, barriers and memory of the other blocks, and 8x8 tiles between registers and
// shared memory.
#pragma once

#include "kernels/cuda/hopper.cuh"

namespace mm::cuda::hopper {

__device__ inline uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// All threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// To the same shared-memory address of block `rank`, whose barrier `bar` counts the 16 bytes.
__device__ inline void cluster_send(uint32_t address, uint32_t bar, int rank, float4 v) {
  asm volatile(
      "{\n.reg .b32 remote, counts;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counts, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [remote], {%3, %4, %5, %6}, [counts];\n"
      "}\n" ::"r"(address),
      "r"(bar), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// A value that the whole warp shares, in a form that tells the compiler so: what follows from it (descriptors, loops)
// is then computed once in uniform registers.
__device__ inline int uniform(int x) { return __reduce_min_sync(0xffffffffu, x); }

// Barriers by shared-memory address (an address + 8 i is the next barrier's).
__device__ inline void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ inline void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// At the same barrier of block `rank` of the cluster (its own included).
__device__ inline void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(bar),
      "r"(rank)
      : "memory");
}
__device__ inline void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// kBlocks 2: the tile lands at the same address of both blocks of the cluster, each block's barrier counts it.
template <int kBlocks>
__device__ inline void load_tile(uint32_t dst, const CUtensorMap* map, uint32_t bar, int x, int y, int z, int w) {
  if constexpr (kBlocks == 1) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w), "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
        : "memory");
  }
}

// True in one lane of a whole warp. The compiler knows that, and then reads the operands of TMA instructions from
// there; in a branch on the lane's number it would loop over the lanes for each of them.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ inline void store_matrices(uint32_t addr, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
__device__ inline void load_matrices(uint32_t addr, uint32_t (&h)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
               : "r"(addr)
               : "memory");
}
__device__ inline uint4 load_shared(uint32_t addr) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(addr)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t addr, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

#if defined(MM_SM90A)

// clang-format off
#define MM_R96 MM_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
               ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MM_R128 MM_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
                ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MM_D96 MM_D64, MM_D8(64), MM_D8(72), MM_D8(80), MM_D8(88)
#define MM_D128 MM_D96, MM_D8(96), MM_D8(104), MM_D8(112), MM_D8(120)
// clang-format on

// wgmma_ss of hopper.cuh for bf16 and tiles up to 256 columns wide.
template <int N, int kTransA, int kTransB>
__device__ inline void wgmma_wide(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 128 || N == 192 || N == 256);
  if constexpr (N == 128) MM_WGMMA_SS(128, "bf16", MM_R64, MM_D64, "64", "65", "66", "67", "68");
  if constexpr (N == 192) MM_WGMMA_SS(192, "bf16", MM_R96, MM_D96, "96", "97", "98", "99", "100");
  if constexpr (N == 256) MM_WGMMA_SS(256, "bf16", MM_R128, MM_D128, "128", "129", "130", "131", "132");
}

#endif  // MM_SM90A

}  // namespace mm::cuda::hopper
