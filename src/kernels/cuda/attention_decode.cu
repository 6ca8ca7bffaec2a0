// Attention of few queries against many keys (a decode step): out = softmax(scale q k^T) v, one query row at a time.
//
// The keys of a (query row, key head) are split over the blocks of a cluster (sm_90 and up; elsewhere over blocks whose
// parts a second kernel merges), within a block over groups of lanes:
//
//   block = 8 warps; group = 8 lanes (4 at d 32) that hold one key's row; kHeads query heads that share the key head
//   are computed from the same loaded keys and values key j of the block's part belongs to group j % groups:
//   neighbouring groups read neighbouring rows keys and values pass through a ring in shared memory (cp.async) of which
//   each thread reads only what it copied itself: many bytes in flight (48 KB a block at d 96), few registers, no
//   barriers
//
// Each group keeps a running maximum, sum and output (fp32, all heads of the block). They merge by shuffles, then
// through shared memory, then every block of a cluster sends its parts to the block that finishes that share of the
// outputs (sent, not fetched: one barrier instead of two), always in the same order. Bound by the read of keys and
// values, 2 * 2 d bytes a key of bf16; at batch 1 by a handful of dependent latencies (row bounds, keys, merge).
//
// Measured on an H100, bf16, in a graph, keys not in L2: 1 x 1,000 keys H8/4 d96 6.0 us (100 keys: 5.2, 4,000: 10), 16
// x 1,000 18 us, 96 x 500 35 us (2.1 TB/s), 96 x 1,000 H8/2 d64 24 us (2.0 TB/s). With keys in registers instead of a
// ring: 16 x 1,000 21 us, 96 x 500 39 us; 96 x 500 in two parts a row instead of one 39 us.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/cluster.cuh"

namespace mm::cuda {

namespace {

constexpr int n_warp = 8, n_thread = 32 * n_warp, max_split = 8;

// How a row of D elements of T is spread over lanes.
template <class T, int D>
struct Spread {
  static constexpr int lanes = D >= 64 ? 8 : 4, elements = D / lanes;  // of a lane
  static constexpr int V = elements % per_16_bytes<T> == 0 ? per_16_bytes<T> : 4, per_lane = elements / V;
  static constexpr int unroll = sizeof(T) == 2 ? 2 : 1;  // keys of a group at a time
  // The ring; with what else the kernel keeps it must fit 99 KB.
  static constexpr int chunk_bytes = V * static_cast<int>(sizeof(T));
  static constexpr int stage_bytes = 2 * unroll * per_lane * chunk_bytes * n_thread;
  static constexpr int stages = stage_bytes <= 24 * 1024 ? 3 : 2, shared = stages * stage_bytes;
};

// A query row and the keys it sees; n_key is 0 when there is nothing to do.
struct RowBounds {
  int row = 0, kv0 = 0, n_key = 0;

  // The only row of sequence s; nothing when it has more or none.
  __device__ __forceinline__ void of_sequence(const Attention& a, int s) {
    row = a.cu[s];
    kv0 = a.kv_start != nullptr ? a.kv_start[s] : row;
    n_key = a.kv_len != nullptr ? a.kv_len[s] : 1;
    if (a.cu[s + 1] != row + 1) n_key = 0;
  }

  // Of some sequence; every lane of a warp looks at one.
  __device__ __forceinline__ void of_row(const Attention& a, int r) {
    row = r;
    const int lane = static_cast<int>(threadIdx.x) % 32, n_seq = static_cast<int>(a.n_seq);
    for (int first = 0; first < n_seq; first += 32) {
      const int s = first + lane;
      int begin = 0, end = 0, start = 0, len = 0;
      if (s < n_seq) {
        begin = a.cu[s], end = a.cu[s + 1];
        start = a.kv_start != nullptr ? a.kv_start[s] : begin;
        len = a.kv_len != nullptr ? a.kv_len[s] : end - begin;
      }
      const unsigned owner = __ballot_sync(0xffffffffu, begin <= row && row < end);
      if (owner == 0) continue;
      const int from = __ffs(static_cast<int>(owner)) - 1;
      kv0 = __shfl_sync(0xffffffffu, start, from);
      n_key = __shfl_sync(0xffffffffu, len - (end - begin) + (row - begin) + 1, from);
      return;
    }
  }
};

__device__ __forceinline__ float reference(float m) { return m == minus_infinity() ? 0.0f : m; }

// by_sequence: blockIdx.z is a sequence, not a row.
// part: where the blocks of one (row, head) leave {m, l, out[D]}, [row, head, split, D + 2]; null: a cluster merges.
template <class T, int D, int kHeads>
__global__ void __launch_bounds__(n_thread, sizeof(T) == 2 && kHeads * Spread<T, D>::elements <= 32 ? 2 : 1)
    decode_kernel(const __grid_constant__ Attention a, float scale2, int n_split, bool by_sequence, float* part) {
  using S = Spread<T, D>;
  constexpr int E = S::elements, V = S::V, groups = n_thread / S::lanes;
  __shared__ float warp_ml[2][n_warp][kHeads], warp_out[n_warp][kHeads][D];
  // What the blocks of the cluster sent: {maximum, sum} of all heads, and their values of this block's outputs.
  __shared__ float sent_ml[2][max_split][kHeads], sent_out[kHeads * D];
  const int split = static_cast<int>(blockIdx.x), first_head = static_cast<int>(blockIdx.y) * kHeads;
  const int kv_head = first_head / (a.n_head / a.n_kv_head);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int member = tid % S::lanes;
  cluster_arrive();

  RowBounds bounds;
  if (by_sequence) bounds.of_sequence(a, static_cast<int>(blockIdx.z));
  else bounds.of_row(a, static_cast<int>(blockIdx.z));
  if (bounds.n_key <= 0) {  // more queries, or a row of no sequence: batches of fixed size have them
    cluster_wait();
    return;
  }
  const int row = bounds.row;
  const int share = (bounds.n_key + n_split - 1) / n_split, begin = split * share;
  const int end = min(begin + share, bounds.n_key);
  const T* k = static_cast<const T*>(a.k) + bounds.kv0 * a.ldk + kv_head * D;
  const T* v = static_cast<const T*>(a.v) + bounds.kv0 * a.ldv + kv_head * D;

  constexpr int unroll = S::unroll;
  extern __shared__ __align__(128) unsigned char ring[];
  // Chunk c of key u of a stage, of k (0) or v (1): each at a distance of all threads, so neighbours lie side by side.
  const auto slot = [&](int stage, int kv, int u, int c) {
    return stage * S::stage_bytes + (((kv * unroll + u) * S::per_lane + c) * n_thread + tid) * S::chunk_bytes;
  };
  const uint32_t ring_at = shared_address(ring);
  const int own = begin + tid / S::lanes, n_round = (end - begin + unroll * groups - 1) / (unroll * groups);
  const auto copy_round = [&](int round, int stage) {
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const int64_t key = own + (round * unroll + u) * groups;
      const bool valid = key < end;
      const T *k_row = valid ? k + key * a.ldk : k, *v_row = valid ? v + key * a.ldv : v;
#pragma unroll
      for (int c = 0; c < S::per_lane; c++) {
        const int at = (c * S::lanes + member) * V;
        if constexpr (S::chunk_bytes == 16) {
          cp_async16(ring_at + slot(stage, 0, u, c), k_row + at, valid);
          cp_async16(ring_at + slot(stage, 1, u, c), v_row + at, valid);
        } else {
          cp_async8(ring_at + slot(stage, 0, u, c), k_row + at, valid);
          cp_async8(ring_at + slot(stage, 1, u, c), v_row + at, valid);
        }
      }
    }
  };
#pragma unroll
  for (int i = 0; i < S::stages - 1; i++) {
    if (i < n_round) copy_round(i, i);
    cp_async_commit();
  }
  float q[kHeads][E], out[kHeads][E], m[kHeads], l[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    const T* from = static_cast<const T*>(a.q) + row * a.ldq + (first_head + h) * D;
#pragma unroll
    for (int c = 0; c < S::per_lane; c++) {
      float x[V];
      load<T, V>(x, from + (c * S::lanes + member) * V);
#pragma unroll
      for (int e = 0; e < V; e++) q[h][c * V + e] = x[e] * scale2, out[h][c * V + e] = 0.0f;
    }
    m[h] = minus_infinity(), l[h] = 0.0f;
  }
  // Every lane of a warp runs the same rounds: the shuffles below need them all.
  for (int round = 0, stage = 0; round < n_round; round++) {
    const int ahead = round + S::stages - 1;
    asm volatile("" ::: "memory");  // what the copies overwrite has been read
    if (ahead < n_round) copy_round(ahead, stage == 0 ? S::stages - 1 : stage - 1);
    cp_async_commit();
    cp_async_wait<S::stages - 1>();
    float s[unroll][kHeads];
#pragma unroll
    for (int u = 0; u < unroll; u++) {
#pragma unroll
      for (int h = 0; h < kHeads; h++) s[u][h] = 0.0f;
#pragma unroll
      for (int c = 0; c < S::per_lane; c++) {
        float x[V];
        load<T, V>(x, reinterpret_cast<const T*>(ring + slot(stage, 0, u, c)));
#pragma unroll
        for (int h = 0; h < kHeads; h++) {
#pragma unroll
          for (int e = 0; e < V; e++) s[u][h] += q[h][c * V + e] * x[e];
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; h++) {
        s[u][h] = warp_sum<S::lanes>(s[u][h]);
        if (own + (round * unroll + u) * groups >= end) s[u][h] = minus_infinity();
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      float top = m[h];
#pragma unroll
      for (int u = 0; u < unroll; u++) top = fmaxf(top, s[u][h]);
      if (__any_sync(0xffffffffu, top > m[h])) {
        const float f = top > m[h] ? exp2_fast(m[h] - top) : 1.0f;
        m[h] = top;
        l[h] *= f;
#pragma unroll
        for (int e = 0; e < E; e++) out[h][e] *= f;
      }
#pragma unroll
      for (int u = 0; u < unroll; u++) l[h] += s[u][h] = exp2_fast(s[u][h] - reference(m[h]));
    }
#pragma unroll
    for (int u = 0; u < unroll; u++) {
#pragma unroll
      for (int c = 0; c < S::per_lane; c++) {
        float x[V];
        load<T, V>(x, reinterpret_cast<const T*>(ring + slot(stage, 1, u, c)));
#pragma unroll
        for (int h = 0; h < kHeads; h++) {
#pragma unroll
          for (int e = 0; e < V; e++) out[h][c * V + e] += s[u][h] * x[e];
        }
      }
    }
    stage = stage == S::stages - 1 ? 0 : stage + 1;
  }

  // Groups of a warp, by halves.
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    const float top = [&] {
      float x = m[h];
#pragma unroll
      for (int i = S::lanes; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
      return x;
    }();
    const float f = exp2_fast(m[h] - reference(top));
    l[h] *= f;
#pragma unroll
    for (int i = S::lanes; i < 32; i *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], i);
#pragma unroll
    for (int e = 0; e < E; e++) {
      out[h][e] *= f;
#pragma unroll
      for (int i = S::lanes; i < 32; i *= 2) out[h][e] += __shfl_xor_sync(0xffffffffu, out[h][e], i);
    }
    if (lane == 0) warp_ml[0][warp][h] = top, warp_ml[1][warp][h] = l[h];
    if (lane < S::lanes) {
#pragma unroll
      for (int e = 0; e < E; e++) warp_out[warp][h][(e / V * S::lanes + member) * V + e % V] = out[h][e];
    }
  }
  __syncthreads();
  // Warps of the block.
  const int slice = kHeads * D / n_split;  // outputs that one block of the cluster finishes
  for (int i = tid; i < kHeads * D; i += n_thread) {
    const int h = i / D, c = i % D;
    float top = minus_infinity(), sum = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < n_warp; w++) top = fmaxf(top, warp_ml[0][w][h]);
#pragma unroll
    for (int w = 0; w < n_warp; w++) {
      const float f = exp2_fast(warp_ml[0][w][h] - reference(top));
      sum += f * warp_ml[1][w][h];
      x += f * warp_out[w][h][c];
    }
    if (part != nullptr) {
      float* to = part + ((static_cast<int64_t>(blockIdx.z) * a.n_head + first_head + h) * n_split + split) * (D + 2);
      to[2 + c] = x;
      if (c == 0) to[0] = top, to[1] = sum;
    } else {
      if (i < n_thread) cluster_wait();  // all blocks have begun; every thread comes here or below once
      cluster_store(&sent_out[split * slice + i % slice], i / slice, x);
      if (c < n_split) {
        cluster_store(&sent_ml[0][split][h], c, top);
        cluster_store(&sent_ml[1][split][h], c, sum);
      }
    }
  }
  if (part != nullptr || tid >= kHeads * D) cluster_wait();
  if (part != nullptr) return;
  cluster_arrive();
  cluster_wait();
  __syncthreads();  // the same where there are no clusters and the block is alone
  for (int j = tid; j < slice; j += n_thread) {
    const int i = split * slice + j, h = i / D, c = i % D;
    float top = minus_infinity(), sum = 0.0f, x = 0.0f;
    for (int r = 0; r < n_split; r++) top = fmaxf(top, sent_ml[0][r][h]);
    for (int r = 0; r < n_split; r++) {
      const float f = exp2_fast(sent_ml[0][r][h] - reference(top));
      sum += f * sent_ml[1][r][h];
      x += f * sent_out[r * slice + j];
    }
    static_cast<T*>(a.out)[row * a.ldo + (first_head + h) * D + c] = from_float<T>(x / sum);
    if (a.lse != nullptr && c == 0)
      a.lse[static_cast<int64_t>(row) * a.n_head + first_head + h] = (top + log2f(sum)) * ln_2;
  }
}

// Where there are no clusters.
template <class T, int D>
__global__ void __launch_bounds__(D)
    decode_merge_kernel(const __grid_constant__ Attention a, int n_split, bool by_sequence, const float* part) {
  const int head = static_cast<int>(blockIdx.x), c = static_cast<int>(threadIdx.x);
  RowBounds bounds;
  if (by_sequence) bounds.of_sequence(a, static_cast<int>(blockIdx.y));
  else bounds.of_row(a, static_cast<int>(blockIdx.y));
  if (bounds.n_key <= 0) return;
  const int64_t row = bounds.row, at = static_cast<int64_t>(blockIdx.y) * a.n_head + head;
  const float* from = part + at * n_split * (D + 2);
  float top = minus_infinity(), sum = 0.0f, x = 0.0f;
  for (int r = 0; r < n_split; r++) top = fmaxf(top, from[r * (D + 2)]);
  for (int r = 0; r < n_split; r++) {
    const float f = exp2_fast(from[r * (D + 2)] - reference(top));
    sum += f * from[r * (D + 2) + 1];
    x += f * from[r * (D + 2) + 2 + c];
  }
  static_cast<T*>(a.out)[row * a.ldo + head * D + c] = from_float<T>(x / sum);
  if (a.lse != nullptr && c == 0) a.lse[row * a.n_head + head] = (top + log2f(sum)) * ln_2;
}

template <class T, int D, int kHeads>
void launch(const Context& ctx, const Attention& a, bool by_sequence) {
  constexpr int shared = Spread<T, D>::shared;
  const auto kernel = decode_kernel<T, D, kHeads>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  MM_CUDA_CHECK(once);
  const int rows = static_cast<int>(by_sequence ? a.n_seq : a.n_tok), columns = a.n_head / kHeads;
  int n_split = 1;  // as many as are resident at once, two blocks an SM
  while (n_split < max_split && 2 * n_split * rows * columns <= 2 * ctx.n_sm) n_split *= 2;
  const dim3 grid(static_cast<unsigned>(n_split), static_cast<unsigned>(columns), static_cast<unsigned>(rows));
  const float scale2 = a.scale * log2_e;
  if (ctx.arch >= 90) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(n_split);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(n_thread);
    config.dynamicSmemBytes = shared;
    config.stream = ctx.stream;
    config.attrs = &cluster;
    config.numAttrs = n_split > 1 ? 1 : 0;
    MM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a, scale2, n_split, by_sequence, static_cast<float*>(nullptr)));
    return;
  }
  if (n_split == 1) {
    kernel<<<grid, n_thread, shared, ctx.stream>>>(a, scale2, 1, by_sequence, static_cast<float*>(nullptr));
    MM_CUDA_LAUNCHED();
    return;
  }
  auto* part = Scratch(ctx).take<float>(static_cast<size_t>(rows) * static_cast<size_t>(a.n_head * n_split * (D + 2)));
  kernel<<<grid, n_thread, shared, ctx.stream>>>(a, scale2, n_split, by_sequence, part);
  MM_CUDA_LAUNCHED();
  decode_merge_kernel<T, D><<<dim3(static_cast<unsigned>(a.n_head), static_cast<unsigned>(rows)), D, 0, ctx.stream>>>(
      a, n_split, by_sequence, part);
  MM_CUDA_LAUNCHED();
}

template <class T, int D>
void launch_for_group(const Context& ctx, const Attention& a, bool by_sequence) {
  const int group = a.n_head / a.n_kv_head;
  if (group % 4 == 0) return launch<T, D, 4>(ctx, a, by_sequence);
  if (group % 2 == 0) return launch<T, D, 2>(ctx, a, by_sequence);
  launch<T, D, 1>(ctx, a, by_sequence);
}

}  // namespace

void decode_attention_fwd(const Context& ctx, DType t, const Attention& a, bool singles_only) {
  if (a.n_tok == 0) return;
  dispatch(t, [&]<class T>(T) {
    switch (a.d_head) {
      case 32: return launch_for_group<T, 32>(ctx, a, singles_only);
      case 64: return launch_for_group<T, 64>(ctx, a, singles_only);
      case 96: return launch_for_group<T, 96>(ctx, a, singles_only);
      case 128: return launch_for_group<T, 128>(ctx, a, singles_only);
      default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
    }
  });
}

}  // namespace mm::cuda
