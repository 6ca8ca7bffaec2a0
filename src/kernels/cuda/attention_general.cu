// Attention for every type, any d_head up to 256, any alignment, with dropout of the weights and keys longer than
// queries. fp32 arithmetic on plain cores: the oracle of the fast paths, and what training in fp32 uses.
//
// One warp owns R rows (queries of a head, or, for dk and dv, keys of a key head); a block is 8 R neighbouring rows of
// one sequence, which share tiles of 32 rows of the other side in shared memory as fp32.
//
//   scores:  lane = row of the tile, dot products over d by float4 (the tile's row distance is an odd number of float4,
//            so 8 lanes hit 8 groups of banks; the warp's own rows are broadcast)
//   sums:    lane = element of d (c = lane + 32 i), the tile's 32 weights pass by shuffles
//
// Each value read from the tile serves R rows. Sums over keys run in the order of the keys, those over the heads of a
// group in the order of the heads: the same bits every time. A row never touches what it does not see, not even times
// 0.
//
// Measured on an H100, fp32, B32 T768 H8/4 d96: forward 3.5 ms (8 TFLOP/s), backward 10.7 ms (7). With one row a warp
// and the tile's loads one after another it was 7.7 and 18 ms.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace mm::cuda {

namespace {

constexpr int n_warp = 8, n_thread = 32 * n_warp, tile = 32;

// Elements of d a lane and rows a warp: what fits 99 KB of shared memory in the backward kernels.
__host__ __device__ constexpr int elements_for(int d) { return d <= 128 ? 4 : 8; }
__host__ __device__ constexpr int rows_for(int elements) { return elements == 4 ? 4 : 2; }

__host__ __device__ constexpr int padded(int d) {  // row distance in floats: an odd number of float4
  const int quads = (d + 3) / 4;
  return 4 * (quads | 1);
}
size_t shared_bytes(int d, int own) {  // own: rows kept for each row of the block
  const int rows = rows_for(elements_for(d));
  return sizeof(float) * static_cast<size_t>(padded(d)) * static_cast<size_t>(2 * tile + own * rows * n_warp);
}

struct Dropout {
  float p, kept;  // kept: 1 / (1 - p)
  uint64_t seed, stream;
  __device__ __forceinline__ float factor(int64_t row, int n_head, int head, int key) const {
    if (p <= 0.0f) return 1.0f;
    const uint4 r =
        philox(seed, stream, static_cast<uint64_t>(row * n_head + head) << 32 | static_cast<uint64_t>(key / 4));
    const uint32_t x = key % 4 == 0 ? r.x : key % 4 == 1 ? r.y : key % 4 == 2 ? r.z : r.w;
    return to_unit_float(x) < p ? 0.0f : kept;
  }
};
Dropout dropout_of(const Attention& a) {
  return {a.dropout, static_cast<float>(1.0 / (1.0 - static_cast<double>(a.dropout))), a.seed, a.stream};
}

// Rows [0, n_valid) of src as floats, zeros below them and up to a multiple of 4 columns. All loads of a thread are in
// flight at once.
template <int C, class T>
__device__ __forceinline__ void load_tile(float* to, const T* src, int64_t ld, int n_valid, int d) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, width = padded(d);
  float x[tile / n_warp][C];
#pragma unroll
  for (int r = 0; r < tile / n_warp; r++) {
    const int row = warp + r * n_warp;
#pragma unroll
    for (int i = 0; i < C; i++) {
      const int c = lane + 32 * i;
      x[r][i] = row < n_valid && c < d ? to_float(src[row * ld + c]) : 0.0f;
    }
  }
#pragma unroll
  for (int r = 0; r < tile / n_warp; r++) {
#pragma unroll
    for (int i = 0; i < C; i++) {
      if (lane + 32 * i < width) to[(warp + r * n_warp) * width + lane + 32 * i] = x[r][i];
    }
  }
}
template <class T>
__device__ __forceinline__ void load_row(float* to, const T* src, bool valid, int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int c = lane; c < padded(d); c += 32) to[c] = valid && c < d ? to_float(src[c]) : 0.0f;
}
// s[r] = own row r * row `lane` of the tile.
template <int R>
__device__ __forceinline__ void dots(float (&s)[R], const float* own, const float* rows, int d) {
  const int width = padded(d);
  const float* const other = rows + static_cast<int>(threadIdx.x) % 32 * width;
#pragma unroll
  for (int r = 0; r < R; r++) s[r] = 0.0f;
  for (int c = 0; c < d; c += 4) {
    const float4 y = *reinterpret_cast<const float4*>(other + c);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float4 x = *reinterpret_cast<const float4*>(own + r * width + c);
      s[r] += x.x * y.x;
      s[r] += x.y * y.y;
      s[r] += x.z * y.z;
      s[r] += x.w * y.w;
    }
  }
}
// acc[r] += sum over rows j in [from[r], to[r]) of the tile of (weight[r] of lane j) * row j.
template <int R, int C>
__device__ __forceinline__ void add_rows(float (&acc)[R][C], const float (&weight)[R], const float* rows,
                                         const int (&from)[R], const int (&to)[R], int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32, width = padded(d);
  int first = from[0], last = to[0];
#pragma unroll
  for (int r = 1; r < R; r++) first = min(first, from[r]), last = max(last, to[r]);
#pragma unroll 4
  for (int j = first; j < last; j++) {
    float x[C];
#pragma unroll
    for (int i = 0; i < C; i++) x[i] = lane + 32 * i < d ? rows[j * width + lane + 32 * i] : 0.0f;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float w = __shfl_sync(0xffffffffu, weight[r], j);
      if (j >= from[r] && j < to[r]) {
#pragma unroll
        for (int i = 0; i < C; i++) acc[r][i] += w * x[i];
      }
    }
  }
}
template <int C, class T>
__device__ __forceinline__ void store_row(T* to, const float (&acc)[C], float factor, int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < C; i++) {
    if (lane + 32 * i < d) to[lane + 32 * i] = from_float<T>(acc[i] * factor);
  }
}

template <class T, int C>
__global__ void __launch_bounds__(n_thread, 1) general_fwd_kernel(const __grid_constant__ Attention a, Dropout drop) {
  constexpr int R = rows_for(C), block_rows = R * n_warp;
  const int head = static_cast<int>(blockIdx.x) % a.n_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int i0 = work.row + warp * R, block_keys = min(work.row + block_rows, seq.q_len) + seq.shift;
  const int64_t row0 = seq.q0 + i0, kv_column = head / (a.n_head / a.n_kv_head) * d;
  extern __shared__ float4 shared4[];
  float* const keys = reinterpret_cast<float*>(shared4);
  float* const values = keys + tile * width;
  float* const queries = values + tile * width + warp * R * width;
  float m[R], l[R], acc[R][C];
  int n_key[R], most = 0;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const bool valid = i0 + r < seq.q_len;
    load_row(queries + r * width, static_cast<const T*>(a.q) + (row0 + r) * a.ldq + head * d, valid, d);
    most = max(most, n_key[r] = valid ? i0 + r + seq.shift + 1 : 0);
    m[r] = minus_infinity(), l[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < C; c++) acc[r][c] = 0.0f;
  }
  for (int first = 0; first < block_keys; first += tile) {
    __syncthreads();
    load_tile<C>(keys, static_cast<const T*>(a.k) + (seq.kv0 + first) * a.ldk + kv_column, a.ldk, seq.kv_len - first,
                 d);
    load_tile<C>(values, static_cast<const T*>(a.v) + (seq.kv0 + first) * a.ldv + kv_column, a.ldv, seq.kv_len - first,
                 d);
    __syncthreads();
    if (first >= most) continue;
    float s[R];
    int from[R], to[R];
    dots(s, queries, keys, d);
#pragma unroll
    for (int r = 0; r < R; r++) {
      s[r] = first + lane < n_key[r] ? s[r] * a.scale : minus_infinity();
      const float top = fmaxf(m[r], warp_max(s[r])), base = top == minus_infinity() ? 0.0f : top;
      const float f = m[r] == top ? 1.0f : expf(m[r] - top);
      s[r] = expf(s[r] - base);
      m[r] = top;
      l[r] = l[r] * f + s[r];
      s[r] *= drop.factor(row0 + r, a.n_head, head, first + lane);
      from[r] = 0, to[r] = min(tile, n_key[r] - first);
#pragma unroll
      for (int c = 0; c < C; c++) acc[r][c] *= f;
    }
    add_rows(acc, s, values, from, to, d);
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (i0 + r >= seq.q_len) break;
    const float sum = warp_sum(l[r]);
    store_row(static_cast<T*>(a.out) + (row0 + r) * a.ldo + head * d, acc[r], 1.0f / sum, d);
    if (a.lse != nullptr && lane == 0) a.lse[(row0 + r) * a.n_head + head] = m[r] + logf(sum);
  }
}

// dq, and delta = dout * out of every (query, head) for the kernel below.
template <class T, int C>
__global__ void __launch_bounds__(n_thread, 1)
    general_dq_kernel(const __grid_constant__ AttentionBwd b, Dropout drop, float* delta) {
  constexpr int R = rows_for(C), block_rows = R * n_warp;
  const Attention& a = b.fwd;
  const int head = static_cast<int>(blockIdx.x) % a.n_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int i0 = work.row + warp * R, block_keys = min(work.row + block_rows, seq.q_len) + seq.shift;
  const int64_t row0 = seq.q0 + i0, kv_column = head / (a.n_head / a.n_kv_head) * d;
  extern __shared__ float4 shared4[];
  float* const keys = reinterpret_cast<float*>(shared4);
  float* const values = keys + tile * width;
  float* const queries = values + tile * width + warp * R * width;
  float* const grads = queries + n_warp * R * width;
  float row_delta[R], lse[R], acc[R][C];
  int n_key[R], most = 0;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const bool valid = i0 + r < seq.q_len;
    load_row(queries + r * width, static_cast<const T*>(a.q) + (row0 + r) * a.ldq + head * d, valid, d);
    load_row(grads + r * width, static_cast<const T*>(b.dout) + (row0 + r) * b.lddout + head * d, valid, d);
    most = max(most, n_key[r] = valid ? i0 + r + seq.shift + 1 : 0);
    row_delta[r] = lse[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < C; c++) acc[r][c] = 0.0f;
    if (valid) {
      for (int c = lane; c < d; c += 32)
        row_delta[r] +=
            grads[r * width + c] * to_float(static_cast<const T*>(a.out)[(row0 + r) * a.ldo + head * d + c]);
      row_delta[r] = warp_sum(row_delta[r]);
      lse[r] = a.lse[(row0 + r) * a.n_head + head];
      if (lane == 0) delta[(row0 + r) * a.n_head + head] = row_delta[r];
    }
  }
  for (int first = 0; first < block_keys; first += tile) {
    __syncthreads();
    load_tile<C>(keys, static_cast<const T*>(a.k) + (seq.kv0 + first) * a.ldk + kv_column, a.ldk, seq.kv_len - first,
                 d);
    load_tile<C>(values, static_cast<const T*>(a.v) + (seq.kv0 + first) * a.ldv + kv_column, a.ldv, seq.kv_len - first,
                 d);
    __syncthreads();
    if (first >= most) continue;
    float s[R], dp[R];
    int from[R], to[R];
    dots(s, queries, keys, d);
    dots(dp, grads, values, d);
#pragma unroll
    for (int r = 0; r < R; r++) {
      dp[r] *= drop.factor(row0 + r, a.n_head, head, first + lane);
      s[r] = expf(s[r] * a.scale - lse[r]) * (dp[r] - row_delta[r]) * a.scale;
      from[r] = 0, to[r] = min(tile, n_key[r] - first);
    }
    add_rows(acc, s, keys, from, to, d);
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (i0 + r >= seq.q_len) break;
    store_row(static_cast<T*>(b.dq) + (row0 + r) * b.lddq + head * d, acc[r], 1.0f, d);
  }
}

template <class T, int C>
__global__ void __launch_bounds__(n_thread, 1)
    general_dkv_kernel(const __grid_constant__ AttentionBwd b, Dropout drop, const float* delta) {
  constexpr int R = rows_for(C), block_rows = R * n_warp;
  const Attention& a = b.fwd;
  const int kv_head = static_cast<int>(blockIdx.x) % a.n_kv_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_kv_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // The first keys have most queries: tiles are counted from the sequence's end, keys from its beginning.
  const int block_key = ((seq.q_len - 1) / block_rows - work.row / block_rows) * block_rows;
  const int key0 = block_key + warp * R, group = a.n_head / a.n_kv_head;
  extern __shared__ float4 shared4[];
  float* const queries = reinterpret_cast<float*>(shared4);
  float* const grads = queries + tile * width;
  float* const keys = grads + tile * width + warp * R * width;
  float* const values = keys + n_warp * R * width;
  float dk[R][C], dv[R][C];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const bool valid = key0 + r < seq.q_len;
    const int64_t row = seq.kv0 + key0 + r;
    load_row(keys + r * width, static_cast<const T*>(a.k) + row * a.ldk + kv_head * d, valid, d);
    load_row(values + r * width, static_cast<const T*>(a.v) + row * a.ldv + kv_head * d, valid, d);
#pragma unroll
    for (int c = 0; c < C; c++) dk[r][c] = dv[r][c] = 0.0f;
  }
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int first = block_key / tile * tile; first < seq.q_len; first += tile) {
      const int64_t row0 = seq.q0 + first;
      __syncthreads();
      load_tile<C>(queries, static_cast<const T*>(a.q) + row0 * a.ldq + head * d, a.ldq, seq.q_len - first, d);
      load_tile<C>(grads, static_cast<const T*>(b.dout) + row0 * b.lddout + head * d, b.lddout, seq.q_len - first, d);
      __syncthreads();
      const int end = min(tile, seq.q_len - first);
      if (key0 >= seq.q_len || key0 - first >= end) continue;
      float lse = 0.0f, row_delta = 0.0f, s[R], dp[R];
      int from[R], to[R];  // queries of the tile that see the key
      if (lane < end) {
        lse = a.lse[(row0 + lane) * a.n_head + head];
        row_delta = delta[(row0 + lane) * a.n_head + head];
      }
      dots(s, keys, queries, d);
      dots(dp, values, grads, d);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float p = expf(s[r] * a.scale - lse), kept = drop.factor(row0 + lane, a.n_head, head, key0 + r);
        s[r] = p * kept;
        dp[r] = p * (dp[r] * kept - row_delta) * a.scale;
        from[r] = max(key0 + r - first, 0), to[r] = end;
      }
      add_rows(dv, s, grads, from, to, d);
      add_rows(dk, dp, queries, from, to, d);
    }
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (key0 + r >= seq.q_len) break;
    const int64_t row = seq.kv0 + key0 + r;
    store_row(static_cast<T*>(b.dk) + row * b.lddk + kv_head * d, dk[r], 1.0f, d);
    store_row(static_cast<T*>(b.dv) + row * b.lddv + kv_head * d, dv[r], 1.0f, d);
  }
}

template <class K, class... Args>
void launch(K kernel, const Context& ctx, int64_t blocks, size_t shared, const Args&... args) {
  MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<static_cast<unsigned>(blocks), n_thread, shared, ctx.stream>>>(args...);
  MM_CUDA_LAUNCHED();
}

void check_width(int d) {
  if (d > 256) fail("attention", "d_head above 256", __FILE__, __LINE__);
}

}  // namespace

void general_attention_fwd(const Context& ctx, DType t, const Attention& a) {
  check_width(a.d_head);
  const int64_t tiles = tile_grid(a, rows_for(elements_for(a.d_head)) * n_warp);
  if (tiles == 0) return;
  dispatch(t, [&]<class T>(T) {
    launch(elements_for(a.d_head) == 4 ? general_fwd_kernel<T, 4> : general_fwd_kernel<T, 8>, ctx, tiles * a.n_head,
           shared_bytes(a.d_head, 1), a, dropout_of(a));
  });
}

size_t general_attention_bwd_scratch(int64_t n_tok, int n_head) {
  return (static_cast<size_t>(n_tok) * static_cast<size_t>(n_head) * sizeof(float) + 255) / 256 * 256;
}

void general_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  check_width(a.d_head);
  const int64_t tiles = tile_grid(a, rows_for(elements_for(a.d_head)) * n_warp);
  if (tiles == 0) return;
  auto* delta = Scratch(ctx).take<float>(static_cast<size_t>(a.n_tok) * static_cast<size_t>(a.n_head));
  const size_t shared = shared_bytes(a.d_head, 2);
  dispatch(t, [&]<class T>(T) {
    launch(elements_for(a.d_head) == 4 ? general_dq_kernel<T, 4> : general_dq_kernel<T, 8>, ctx, tiles * a.n_head,
           shared, b, dropout_of(a), delta);
    launch(elements_for(a.d_head) == 4 ? general_dkv_kernel<T, 4> : general_dkv_kernel<T, 8>, ctx, tiles * a.n_kv_head,
           shared, b, dropout_of(a), static_cast<const float*>(delta));
  });
}

}  // namespace mm::cuda
