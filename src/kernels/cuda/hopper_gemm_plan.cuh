// Which units of a grouped wgrad each cluster computes: longest first, each to the cluster that is free first. Every
// cluster's first warp plays the same game and writes down its own share, 1 to 2 us for 4 experts.
#pragma once

#include "kernels/cuda/hopper_gemm_schedule.h"

namespace mm::cuda {

// Are there few enough units to plan? Otherwise a cluster takes every clusters-th; many are balanced without care.
MM_HD bool plans_units(const SegmentPlan& p) {
  return p.experts.n_expert <= Unit::kMaxExperts && p.tiles < Unit::kMaxTiles && p.clusters <= 96 &&
         p.experts.n_expert * p.tiles + p.clusters <= kMaxUnits;
}

#if defined(__CUDACC__)

// By one whole warp. Returns (to every lane) the number of units that it wrote.
__device__ __forceinline__ int choose_units(const SegmentPlan& p, int cluster, uint32_t* units) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kClustersPerLane = 3;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int share = p.fair_share(), n_expert = p.experts.n_expert;
  // Lane e: expert e. Its place in the order is the number of experts that come before.
  int length = 0, parts = 1, place = 0;
  if (lane < n_expert) {
    parts = p.parts(lane, share);
    length = (p.experts.blocks(lane) + parts - 1) / parts;
  }
  for (int e = 0; e < n_expert; e++) {
    const int other = __shfl_sync(kAll, length, e);
    if (other > length || (other == length && e < lane)) place++;
  }
  int free_at[kClustersPerLane];
  for (int i = 0; i < kClustersPerLane; i++) free_at[i] = lane + 32 * i < p.clusters ? 0 : 0x7fffffff;
  int count = 0;  // on the lane that stands for this cluster
  for (int at = 0; at < n_expert; at++) {
    const int expert = __ffs(static_cast<int>(__ballot_sync(kAll, lane < n_expert && place == at))) - 1;
    const int len = __shfl_sync(kAll, length, expert), n = len == 0 ? 0 : __shfl_sync(kAll, parts, expert) * p.tiles;
    for (int next = 0; next < n;) {
      int first = min(free_at[0], min(free_at[1], free_at[2]));
      first = __reduce_min_sync(kAll, first);
#pragma unroll
      for (int i = 0; i < kClustersPerLane; i++) {
        const bool free = free_at[i] == first;
        const unsigned mask = __ballot_sync(kAll, free);
        const int unit = next + __popc(mask & ((1u << lane) - 1));
        if (free && unit < n) {
          free_at[i] += len;
          if (lane + 32 * i == cluster) units[count++] = Unit{expert, unit / p.tiles, unit % p.tiles}.pack();
        }
        next += __popc(mask);
      }
    }
  }
  return __shfl_sync(kAll, count, cluster % 32);
}

#endif

}  // namespace mm::cuda
