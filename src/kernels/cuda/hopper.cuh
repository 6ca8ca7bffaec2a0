// Thin wrappers of Hopper's instructions (sm_90a): wgmma, mbarriers, TMA tile and bulk copies, fences, setmaxnreg.
// Include it anywhere; use the functions only where MM_SM90A is defined. Nothing here chooses a layout, the facts that
// callers need are these:
//
// Accumulator of a warpgroup's m64nN product: thread t (warp w = t / 32 % 4, lane l = t % 32) holds float d[N / 2],
//   d[i] is row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2.
// A operand from registers (m64k16): 4 words of two elements (lower column in the lower half), columns 2 (l % 4) + 0,
// 1:
//   a[0] row l / 4, a[1] row l / 4 + 8, a[2] as a[0] 8 columns on, a[3] as a[1] 8 columns on. Accumulators
//   d[8 j .. 8 j + 7] packed in pairs are thus the A operand of columns 16 j .. 16 j + 15.
// Shared-memory operands are tiles as TMA writes them, rows of kSwizzle bytes (32, 64, 128), 16-byte chunks of a row
//   exchanged by the hardware; 8 rows are one pattern of 8 kSwizzle bytes, tiles start at a multiple of it (or 1024).
//   K-major ("row i of the operand is row i of the tile"): sbo = 8 kSwizzle, lbo unused; the next 16 columns start
//     32 bytes on, within the kSwizzle bytes.
//   MN-major ("transposed": tile rows run along k, tile columns along m or n): sbo = distance between groups of 8
//     k-rows (8 kSwizzle when contiguous), lbo = distance between blocks of kSwizzle / 2 columns of m or n; the next 16
//     k start 16 kSwizzle bytes on.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MM_SM90A 1
#endif

namespace mm::cuda::hopper {

__device__ inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- mbarriers ----------------------------------------------------------------------------------------------------
// Phase parity: a fresh barrier is in phase 0, wait(b, 0) returns once phase 0 is complete. wait(b, 1) on a fresh
// barrier returns at once.
__device__ inline void mbarrier_init(uint64_t* b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_init_fence() {  // makes the inits visible to the copy engine; then a block barrier
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint64_t* b, uint32_t bytes) {  // arrives and announces bytes to come
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(bytes) : "memory");
}
__device__ inline void mbarrier_wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}\n" ::"r"(smem_address(b)),
      "r"(parity)
      : "memory");
}

// --- copies -------------------------------------------------------------------------------------------------------
__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Tile at element coordinates (x, y[, z]) -> shared memory; elements outside the tensor arrive as zeros and count.
__device__ inline void tma_load_2d(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(smem_address(dst)),
      "l"(map), "r"(smem_address(bar)), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void tma_load_3d(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem_address(dst)),
      "l"(map), "r"(smem_address(bar)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(smem_address(src)), "r"(x), "r"(y)
               : "memory");
}
// Contiguous bytes, a multiple of 16 at 16-byte addresses.
__device__ inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(dst)),
               "l"(src), "r"(bytes), "r"(smem_address(bar))
               : "memory");
}
__device__ inline void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)),
               "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void bulk_wait_read() {  // the sources of all but the last kPending groups may be overwritten
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void bulk_wait() {  // ... are written
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- fences, barriers, registers ----------------------------------------------------------------------------------
// After ordinary stores to shared memory that wgmma or the copy engine reads next: in each writing thread, before the
// barrier that lets the reader go on.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if defined(MM_SM90A)

template <int kRegisters>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- wgmma --------------------------------------------------------------------------------------------------------
// Order: wgmma_fence (after ordinary writes of accumulators or A registers), products, wgmma_commit, ... wgmma_wait<k>.
// Registers and tiles of a product may be touched only after the wait that covers its group.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of these accumulators across this point: call it after the wait (it
// sees no dependence between the wait and the registers) and before products that continue a changed accumulator.
template <int kCount>
__device__ inline void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kSwizzle>
__device__ inline uint64_t wgmma_descriptor(uint32_t address, uint32_t lbo, uint32_t sbo) {
  static_assert(kSwizzle == 0 || kSwizzle == 32 || kSwizzle == 64 || kSwizzle == 128);
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : kSwizzle == 32 ? 3 : 0;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(lbo >> 4) << 16 |
         static_cast<uint64_t>(sbo >> 4) << 32 | kMode << 62;
}

// clang-format off
#define MM_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MM_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MM_R32 MM_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MM_R24 MM_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MM_R48 MM_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MM_R64 MM_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MM_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MM_D16 MM_D8(0), MM_D8(8)
#define MM_D24 MM_D16, MM_D8(16)
#define MM_D32 MM_D16, MM_D8(16), MM_D8(24)
#define MM_D48 MM_D32, MM_D8(32), MM_D8(40)
#define MM_D64 MM_D48, MM_D8(48), MM_D8(56)
// The operands after n accumulators: a, b, accumulate, then 1, 1 (no negation) and the transpositions.
#define MM_WGMMA_SS(N, TYPE, R, D, A, B, P, TA, TB)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" R "}, %" A ", %" B  \
               ", p, 1, 1, %" TA ", %" TB ";\n}\n"                                                      \
               : D : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB))
#define MM_WGMMA_RS(N, TYPE, R, D, A0, A1, A2, A3, B, P, TB)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\n"                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" R "}, {%" A0 ", %" A1 \
               ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" TB ";\n}\n"                                    \
               : D : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB))
// clang-format on

// d [64, N] (+)= A B^T for row-major A [64, 16], B [N, 16], both in shared memory; kTransA, kTransB: that operand is
// MN-major (see above). accumulate 0: d is overwritten.
template <class T, int N, int kTransA = 0, int kTransB = 0>
__device__ inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128 ||
                (std::is_same_v<T, __nv_bfloat16> && (N == 16 || N == 48)));
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (N == 16) MM_WGMMA_SS(16, "bf16", MM_R8, MM_D8(0), "8", "9", "10", "11", "12");
    if constexpr (N == 48) MM_WGMMA_SS(48, "bf16", MM_R24, MM_D24, "24", "25", "26", "27", "28");
    if constexpr (N == 32) MM_WGMMA_SS(32, "bf16", MM_R16, MM_D16, "16", "17", "18", "19", "20");
    if constexpr (N == 64) MM_WGMMA_SS(64, "bf16", MM_R32, MM_D32, "32", "33", "34", "35", "36");
    if constexpr (N == 96) MM_WGMMA_SS(96, "bf16", MM_R48, MM_D48, "48", "49", "50", "51", "52");
    if constexpr (N == 128) MM_WGMMA_SS(128, "bf16", MM_R64, MM_D64, "64", "65", "66", "67", "68");
  } else {
    if constexpr (N == 32) MM_WGMMA_SS(32, "f16", MM_R16, MM_D16, "16", "17", "18", "19", "20");
    if constexpr (N == 64) MM_WGMMA_SS(64, "f16", MM_R32, MM_D32, "32", "33", "34", "35", "36");
    if constexpr (N == 96) MM_WGMMA_SS(96, "f16", MM_R48, MM_D48, "48", "49", "50", "51", "52");
    if constexpr (N == 128) MM_WGMMA_SS(128, "f16", MM_R64, MM_D64, "64", "65", "66", "67", "68");
  }
}

// The same with A in registers.
template <class T, int N, int kTransB = 0>
__device__ inline void wgmma_rs(float (&d)[N / 2], const uint32_t* a, uint64_t b, int accumulate) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128);
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (N == 32) MM_WGMMA_RS(32, "bf16", MM_R16, MM_D16, "16", "17", "18", "19", "20", "21", "22");
    if constexpr (N == 64) MM_WGMMA_RS(64, "bf16", MM_R32, MM_D32, "32", "33", "34", "35", "36", "37", "38");
    if constexpr (N == 96) MM_WGMMA_RS(96, "bf16", MM_R48, MM_D48, "48", "49", "50", "51", "52", "53", "54");
    if constexpr (N == 128) MM_WGMMA_RS(128, "bf16", MM_R64, MM_D64, "64", "65", "66", "67", "68", "69", "70");
  } else {
    if constexpr (N == 32) MM_WGMMA_RS(32, "f16", MM_R16, MM_D16, "16", "17", "18", "19", "20", "21", "22");
    if constexpr (N == 64) MM_WGMMA_RS(64, "f16", MM_R32, MM_D32, "32", "33", "34", "35", "36", "37", "38");
    if constexpr (N == 96) MM_WGMMA_RS(96, "f16", MM_R48, MM_D48, "48", "49", "50", "51", "52", "53", "54");
    if constexpr (N == 128) MM_WGMMA_RS(128, "f16", MM_R64, MM_D64, "64", "65", "66", "67", "68", "69", "70");
  }
}

#endif  // MM_SM90A

}  // namespace mm::cuda::hopper
