// Attention for every type, any d_head up to 256, any alignment, with dropout of the weights and keys longer than
// queries. fp32 arithmetic on plain cores: the oracle of the fast paths, and what training in fp32 uses.
//
// One warp owns one row (a query of a head, or, for dk and dv, a key of a key head); a block is 8 neighbouring rows of
// one sequence, which share tiles of 32 rows of the other side in shared memory as fp32.
//
//   scores:  lane = row of the tile, dot product over d by float4 (the tile's row distance is an odd number of float4,
//            so 8 lanes hit 8 groups of banks; the warp's own row is broadcast)
//   sums:    lane = element of d (c = lane + 32 i), the tile's 32 weights pass by shuffles
//
// A tile costs a warp about 2 d shared-memory cycles: some 10 TFLOP/s on an H100 at d 64. Sums over keys run in the order
// of the keys, those over the heads of a group in the order of the heads: the same bits every time.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace mm::cuda {

namespace {

constexpr int n_warp = 8, n_thread = 32 * n_warp, block_rows = n_warp, tile = 32;

__host__ __device__ constexpr int padded(int d) {  // row distance in floats: an odd number of float4
  const int quads = (d + 3) / 4;
  return 4 * (quads | 1);
}
size_t shared_bytes(int d, int n_tile, int n_row) {
  return sizeof(float) * static_cast<size_t>(padded(d)) * static_cast<size_t>(n_tile * tile + n_row * n_warp);
}

struct Dropout {
  float p, kept;  // kept: 1 / (1 - p)
  uint64_t seed, stream;
  __device__ __forceinline__ float factor(int64_t row, int n_head, int head, int key) const {
    if (p <= 0.0f) return 1.0f;
    const uint4 r = philox(seed, stream,
                           static_cast<uint64_t>(row * n_head + head) << 32 | static_cast<uint64_t>(key / 4));
    const uint32_t x = key % 4 == 0 ? r.x : key % 4 == 1 ? r.y : key % 4 == 2 ? r.z : r.w;
    return to_unit_float(x) < p ? 0.0f : kept;
  }
};
Dropout dropout_of(const Attention& a) {
  return {a.dropout, static_cast<float>(1.0 / (1.0 - static_cast<double>(a.dropout))), a.seed, a.stream};
}

// Rows [0, n_valid) of src as floats, zeros below and right of them.
template <class T>
__device__ __forceinline__ void load_tile(float* to, const T* src, int64_t ld, int n_valid, int d) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, width = padded(d);
  for (int r = warp; r < tile; r += n_warp) {
    for (int c = lane; c < width; c += 32)
      to[r * width + c] = r < n_valid && c < d ? to_float(src[r * ld + c]) : 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void load_row(float* to, const T* src, bool valid, int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int c = lane; c < padded(d); c += 32) to[c] = valid && c < d ? to_float(src[c]) : 0.0f;
}
__device__ __forceinline__ float dot(const float* row, const float* other, int d) {
  float s = 0.0f;
  for (int c = 0; c < d; c += 4) {
    const float4 x = *reinterpret_cast<const float4*>(row + c), y = *reinterpret_cast<const float4*>(other + c);
    s += x.x * y.x;
    s += x.y * y.y;
    s += x.z * y.z;
    s += x.w * y.w;
  }
  return s;
}
// acc += sum over rows j in [from, to) of the tile of (weight of lane j) * row j.
template <int C>
__device__ __forceinline__ void add_rows(float (&acc)[C], float weight, const float* rows, int from, int to, int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32, width = padded(d);
  for (int j = from; j < to; j++) {
    const float w = __shfl_sync(0xffffffffu, weight, j);
#pragma unroll
    for (int i = 0; i < C; i++) {
      if (lane + 32 * i < d) acc[i] += w * rows[j * width + lane + 32 * i];
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
__global__ void __launch_bounds__(n_thread) general_fwd_kernel(const __grid_constant__ Attention a, Dropout drop) {
  const int head = static_cast<int>(blockIdx.x) % a.n_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int i = work.row + warp, n_key = i < seq.q_len ? i + seq.shift + 1 : 0;
  const int block_keys = min(work.row + block_rows, seq.q_len) + seq.shift;
  const int64_t row = seq.q0 + i, kv_column = head / (a.n_head / a.n_kv_head) * d;
  extern __shared__ float4 shared4[];
  float* const keys = reinterpret_cast<float*>(shared4);
  float* const values = keys + tile * width;
  float* const query = values + tile * width + warp * width;
  load_row(query, static_cast<const T*>(a.q) + row * a.ldq + head * d, i < seq.q_len, d);
  float m = minus_infinity(), l = 0.0f, acc[C] = {};
  for (int first = 0; first < block_keys; first += tile) {
    __syncthreads();
    load_tile(keys, static_cast<const T*>(a.k) + (seq.kv0 + first) * a.ldk + kv_column, a.ldk, seq.kv_len - first, d);
    load_tile(values, static_cast<const T*>(a.v) + (seq.kv0 + first) * a.ldv + kv_column, a.ldv, seq.kv_len - first, d);
    __syncthreads();
    if (first >= n_key) continue;
    const float s = first + lane < n_key ? dot(query, keys + lane * width, d) * a.scale : minus_infinity();
    const float top = fmaxf(m, warp_max(s)), from = top == minus_infinity() ? 0.0f : top;
    const float f = m == top ? 1.0f : expf(m - top);
    float p = expf(s - from);
    m = top;
    l = l * f + p;
    p *= drop.factor(row, a.n_head, head, first + lane);
#pragma unroll
    for (int c = 0; c < C; c++) acc[c] *= f;
    add_rows(acc, p, values, 0, min(tile, n_key - first), d);
  }
  if (i >= seq.q_len) return;
  l = warp_sum(l);
  store_row(static_cast<T*>(a.out) + row * a.ldo + head * d, acc, 1.0f / l, d);
  if (a.lse != nullptr && lane == 0) a.lse[row * a.n_head + head] = m + logf(l);
}

// dq, and delta = dout * out of every (query, head) for the kernel below.
template <class T, int C>
__global__ void __launch_bounds__(n_thread)
    general_dq_kernel(const __grid_constant__ AttentionBwd b, Dropout drop, float* delta) {
  const Attention& a = b.fwd;
  const int head = static_cast<int>(blockIdx.x) % a.n_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int i = work.row + warp, n_key = i < seq.q_len ? i + seq.shift + 1 : 0;
  const int block_keys = min(work.row + block_rows, seq.q_len) + seq.shift;
  const int64_t row = seq.q0 + i, kv_column = head / (a.n_head / a.n_kv_head) * d;
  extern __shared__ float4 shared4[];
  float* const keys = reinterpret_cast<float*>(shared4);
  float* const values = keys + tile * width;
  float* const query = values + tile * width + warp * width;
  float* const grad = query + n_warp * width;
  load_row(query, static_cast<const T*>(a.q) + row * a.ldq + head * d, i < seq.q_len, d);
  load_row(grad, static_cast<const T*>(b.dout) + row * b.lddout + head * d, i < seq.q_len, d);
  float row_delta = 0.0f, lse = 0.0f, acc[C] = {};
  if (i < seq.q_len) {
    for (int c = lane; c < d; c += 32)
      row_delta += grad[c] * to_float(static_cast<const T*>(a.out)[row * a.ldo + head * d + c]);
    row_delta = warp_sum(row_delta);
    lse = a.lse[row * a.n_head + head];
    if (lane == 0) delta[row * a.n_head + head] = row_delta;
  }
  for (int first = 0; first < block_keys; first += tile) {
    __syncthreads();
    load_tile(keys, static_cast<const T*>(a.k) + (seq.kv0 + first) * a.ldk + kv_column, a.ldk, seq.kv_len - first, d);
    load_tile(values, static_cast<const T*>(a.v) + (seq.kv0 + first) * a.ldv + kv_column, a.ldv, seq.kv_len - first, d);
    __syncthreads();
    if (first >= n_key) continue;
    const float p = expf(dot(query, keys + lane * width, d) * a.scale - lse);
    const float dp = dot(grad, values + lane * width, d) * drop.factor(row, a.n_head, head, first + lane);
    add_rows(acc, p * (dp - row_delta) * a.scale, keys, 0, min(tile, n_key - first), d);
  }
  if (i < seq.q_len) store_row(static_cast<T*>(b.dq) + row * b.lddq + head * d, acc, 1.0f, d);
}

template <class T, int C>
__global__ void __launch_bounds__(n_thread)
    general_dkv_kernel(const __grid_constant__ AttentionBwd b, Dropout drop, const float* delta) {
  const Attention& a = b.fwd;
  const int kv_head = static_cast<int>(blockIdx.x) % a.n_kv_head, d = a.d_head, width = padded(d);
  const Tile work = find_tile(a, static_cast<int>(blockIdx.x) / a.n_kv_head, block_rows);
  if (work.seq < 0) return;
  const Sequence seq(a, work.seq);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // The first keys have most queries: tiles are counted from the sequence's end, keys from its beginning.
  const int key0 = ((seq.q_len - 1) / block_rows - work.row / block_rows) * block_rows, key = key0 + warp;
  const int group = a.n_head / a.n_kv_head;
  const int64_t kv_row = seq.kv0 + key;
  extern __shared__ float4 shared4[];
  float* const queries = reinterpret_cast<float*>(shared4);
  float* const grads = queries + tile * width;
  float* const k = grads + tile * width + warp * width;
  float* const v = k + n_warp * width;
  load_row(k, static_cast<const T*>(a.k) + kv_row * a.ldk + kv_head * d, key < seq.q_len, d);
  load_row(v, static_cast<const T*>(a.v) + kv_row * a.ldv + kv_head * d, key < seq.q_len, d);
  float dk[C] = {}, dv[C] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int first = key0 / tile * tile; first < seq.q_len; first += tile) {
      const int64_t row0 = seq.q0 + first;
      __syncthreads();
      load_tile(queries, static_cast<const T*>(a.q) + row0 * a.ldq + head * d, a.ldq, seq.q_len - first, d);
      load_tile(grads, static_cast<const T*>(b.dout) + row0 * b.lddout + head * d, b.lddout, seq.q_len - first, d);
      __syncthreads();
      const int from = max(key - first, 0), to = min(tile, seq.q_len - first);  // those that see the key
      if (key >= seq.q_len || from >= to) continue;
      float p = 0.0f, kept = 0.0f, row_delta = 0.0f;
      if (lane >= from && lane < to) {
        const int64_t at = (row0 + lane) * a.n_head + head;
        p = expf(dot(k, queries + lane * width, d) * a.scale - a.lse[at]);
        kept = drop.factor(row0 + lane, a.n_head, head, key);
        row_delta = delta[at];
      }
      const float dp = dot(v, grads + lane * width, d) * kept;
      add_rows(dv, p * kept, grads, from, to, d);
      add_rows(dk, p * (dp - row_delta) * a.scale, queries, from, to, d);
    }
  }
  if (key >= seq.q_len) return;
  store_row(static_cast<T*>(b.dk) + kv_row * b.lddk + kv_head * d, dk, 1.0f, d);
  store_row(static_cast<T*>(b.dv) + kv_row * b.lddv + kv_head * d, dv, 1.0f, d);
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
  const int64_t tiles = tile_grid(a, block_rows);
  if (tiles == 0) return;
  check_width(a.d_head);
  dispatch(t, [&]<class T>(T) {
    launch(a.d_head <= 128 ? general_fwd_kernel<T, 4> : general_fwd_kernel<T, 8>, ctx, tiles * a.n_head,
           shared_bytes(a.d_head, 2, 1), a, dropout_of(a));
  });
}

size_t general_attention_bwd_scratch(int64_t n_tok, int n_head) {
  return (static_cast<size_t>(n_tok) * static_cast<size_t>(n_head) * sizeof(float) + 255) / 256 * 256;
}

void general_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  const int64_t tiles = tile_grid(a, block_rows);
  if (tiles == 0) return;
  check_width(a.d_head);
  auto* delta = Scratch(ctx).take<float>(static_cast<size_t>(a.n_tok) * static_cast<size_t>(a.n_head));
  const size_t shared = shared_bytes(a.d_head, 2, 2);
  dispatch(t, [&]<class T>(T) {
    launch(a.d_head <= 128 ? general_dq_kernel<T, 4> : general_dq_kernel<T, 8>, ctx, tiles * a.n_head, shared, b,
           dropout_of(a), delta);
    launch(a.d_head <= 128 ? general_dkv_kernel<T, 4> : general_dkv_kernel<T, 8>, ctx, tiles * a.n_kv_head, shared, b,
           dropout_of(a), static_cast<const float*>(delta));
  });
}

}  // namespace mm::cuda
