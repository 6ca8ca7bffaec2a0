// Embedding. Forward copies rows of the table. Backward adds row t of dout [n, d] to row ids[t] of dtable [n_vocab, d]:
// many rows go to few places (ids follow Zipf's law) and the order of the sums must not depend on the machine, so the
// positions are sorted by id, and summed tile by tile:
//
//   sorted  |a a a a b|b b b b b|b c d d e|e f ...     tiles of kTile positions, one block each
//            run of a: inside a tile, added to dtable by its block
//            run of b: crosses tiles; tile 0 leaves `tail`, tiles 1 and 2 leave `head` in ctx.scratch, and a second
//            kernel adds them up, tile after tile, and adds the sum to dtable
//
// Every row of dtable is written by one block only. A thread owns 4 columns and loads 4 rows (and the rows of dtable
// that end there) at once. Ids of -1 sort to the end and are skipped.
//
// The sort takes two kernels: blocks sort chunks of 4096 positions, then every position finds its rank by binary search
// in the other chunks. A general radix sort over the device takes 8 launches, 32 us for 24576 ids; this one is
// quadratic in the number of chunks, which stays below the sums' cost up to a million tokens.
//
// Bytes: n d sizeof(T) + 2 * 4 d * (different ids) + the sort's few.
//
// H100, bf16, 768 columns, 6400 ids by Zipf's law: 24576 rows 51 us (sort 14, tiles 28, edges 8), 98304 rows 138 us.
// Slower: CUB's DeviceRadixSort instead of the two kernels 89 us in all; 8 or 16 rows in flight (tiles 30, 32 us). No
// difference: 2 or 8 columns a thread, tiles of 16 or 64 positions.
#include <cub/block/block_radix_sort.cuh>

#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"

namespace mm::cuda {
namespace {

// Row i of out = row ids[i] of the table; zeros for ids below 0.
template <class T, int V>
__global__ void __launch_bounds__(256) fwd_kernel(T* out, const T* table, const int32_t* ids, int64_t n, int64_t d) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= n) return;
  const int32_t id = ids[row];
#pragma unroll 4
  for (int64_t c = threadIdx.x % 32 * V; c < d; c += 32 * V) {
    Raw<T, V> r = {};
    if (id >= 0) r.load(table + id * d + c);
    r.store(out + row * d + c);
  }
}

// A block a row, 8 lanes 64 columns of it.
__global__ void __launch_bounds__(256)
    scaled_kernel(bf16* out, ScaledRows next, const bf16* table, const int32_t* ids, int64_t d) {
  const int64_t row = blockIdx.x;
  let_next_begin();
  wait_for_previous();
  const int32_t id = ids[row];
  for (int64_t first = 0; first < d; first += int64_t{blockDim.x} * 8) {
    const int64_t c = first + threadIdx.x * 8;
    uint4 x = {}, norm = {};
    if (c < d && id >= 0) x = __ldg(reinterpret_cast<const uint4*>(table + id * d + c));
    if (c < d) norm = __ldg(reinterpret_cast<const uint4*>(static_cast<const bf16*>(next.norm) + c));
    float s = 0.0f;
    for (const uint32_t u : {x.x, x.y, x.z, x.w}) {
      const float2 f = unpack2<bf16>(u);
      s += f.x * f.x + f.y * f.y;
    }
    s = warp_sum<8>(s);
    if (c >= d) continue;
    if (threadIdx.x % 8 == 0) next.squares[c / 64 * gridDim.x + row] = s;
    *reinterpret_cast<uint4*>(out + row * d + c) = x;
    *reinterpret_cast<uint4*>(static_cast<bf16*>(next.scaled) + row * d + c) =
        make_uint4(multiply2(x.x, norm.x), multiply2(x.y, norm.y), multiply2(x.z, norm.z), multiply2(x.w, norm.w));
  }
}

// --- sort ---------------------------------------------------------------------------------------------------------
// A key holds the id above the position within the chunk, so keys differ and any sort of them is stable. Ids of -1
// become the largest id, which no vocabulary has.
constexpr int kChunk = 4096, kChunkBits = 12, kSortThreads = 512, kIdBits = 32 - kChunkBits;
constexpr uint32_t kNoId = (1u << kIdBits) - 1;

__global__ void __launch_bounds__(kSortThreads) sort_chunk_kernel(uint32_t* keys, const int32_t* ids, int n, int bits) {
  constexpr int kItems = kChunk / kSortThreads;
  using Sort = cub::BlockRadixSort<uint32_t, kSortThreads, kItems, cub::NullType, 5>;
  __shared__ typename Sort::TempStorage temp;
  const int first = blockIdx.x * kChunk, local = threadIdx.x * kItems;
  uint32_t key[kItems];
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int at = first + local + i;
    key[i] = at < n ? static_cast<uint32_t>(ids[at]) << kChunkBits | static_cast<uint32_t>(local + i) : 0xffffffffu;
  }
  Sort(temp).Sort(key, kChunkBits, kChunkBits + bits);
#pragma unroll
  for (int i = 0; i < kItems; i += 4)
    *reinterpret_cast<uint4*>(keys + first + local + i) = make_uint4(key[i], key[i + 1], key[i + 2], key[i + 3]);
}

// Position of every key in the whole order: its index within its chunk plus the smaller keys of the other chunks (of
// equal ids, those of earlier chunks).
__global__ void __launch_bounds__(256) merge_kernel(int32_t* ids, int32_t* order, const uint32_t* keys, int n) {
  constexpr int kTogether = 4;  // searches in flight
  const int i = blockIdx.x * 256 + threadIdx.x, chunk = i / kChunk, chunks = static_cast<int>(gridDim.x) * 256 / kChunk;
  if (i >= n) return;
  const uint32_t key = keys[i], id = key >> kChunkBits;
  int rank = i % kChunk;
  for (int other = 0; other < chunks; other += kTogether) {
    int below[kTogether] = {};
    for (int step = kChunk / 2; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kTogether; k++) {
        const int c = min(other + k, chunks - 1);
        const uint32_t probe = keys[c * kChunk + below[k] + step - 1] >> kChunkBits;
        if (c < chunk ? probe <= id : probe < id) below[k] += step;
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; k++) {
      const int c = other + k;
      if (c >= chunks || c == chunk) continue;
      const uint32_t probe = keys[c * kChunk + below[k]] >> kChunkBits;
      rank += below[k] + ((c < chunk ? probe <= id : probe < id) ? 1 : 0);
    }
  }
  ids[rank] = id == kNoId ? -1 : static_cast<int32_t>(id);
  order[rank] = chunk * kChunk + static_cast<int32_t>(key & (kChunk - 1));
}

// --- sums ---------------------------------------------------------------------------------------------------------
struct Sorted {
  const int32_t* ids;    // [n] ascending, -1 last
  const int32_t* order;  // [n] positions before the sort
  int n, tile;
};

constexpr int kNoEnd = -1, kHead = -2, kTail = -3;

// blockDim.x * V columns from blockIdx.y on; blockIdx.x is the tile. `edges` [tiles][2][d]: head and tail.
template <class T, int V, int kBatch>
__global__ void tile_kernel(float* dtable, float* edges, const T* dout, Sorted s, int64_t d) {
  extern __shared__ int2 plan[];  // [tile]: row of dout (-1: none); where its sum goes: a row of dtable, kHead, ...
  const int first = blockIdx.x * s.tile, count = min(s.tile, s.n - first);
  const int32_t before = first > 0 ? s.ids[first - 1] : -1, after = first + count < s.n ? s.ids[first + count] : -1;
  for (int i = threadIdx.x; i < s.tile; i += blockDim.x) {
    int2 p = {-1, kNoEnd};
    if (i < count) {
      const int32_t id = s.ids[first + i], next = i < count - 1 ? s.ids[first + i + 1] : -1;
      if (id >= 0) p.x = s.order[first + i];
      // A run that began before goes to head, whether or not it goes on.
      if (id >= 0 && next != id) p.y = id == before ? kHead : id == after ? kTail : id;
    }
    plan[i] = p;
  }
  __syncthreads();
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= d) return;
  float sum[V] = {};
  for (int i0 = 0; i0 < s.tile; i0 += kBatch) {
    Raw<T, V> x[kBatch] = {};
    Raw<float, V> old[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int2 p = plan[i0 + j];
      if (p.x >= 0) x[j].load(dout + p.x * d + c);
      if (p.y >= 0) old[j].load(dtable + p.y * d + c);
    }
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      float v[V];
      x[j].get(v);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += v[k];
      const int to = plan[i0 + j].y;
      if (to == kNoEnd) continue;
      old[j].get(v);  // zeros for edges
#pragma unroll
      for (int k = 0; k < V; k++) v[k] += sum[k], sum[k] = 0;
      float* row = to >= 0 ? dtable + to * d : edges + (int64_t{2} * blockIdx.x + (to == kHead ? 0 : 1)) * d;
      store(row + c, v);
    }
  }
}

// The run that begins in tile blockIdx.x and goes on in the next: its tail and the heads that follow, in kParts
// interleaved sums (blockDim.y).
template <int V, int kParts>
__global__ void edge_kernel(float* dtable, const float* edges, Sorted s, int64_t d) {
  extern __shared__ float partial[];  // [kParts][blockDim.x * V]
  const int next = (blockIdx.x + 1) * s.tile, first = blockIdx.x * s.tile;
  const int32_t id = s.ids[next - 1];
  if (id < 0 || s.ids[next] != id) return;          // no run goes on
  if (first > 0 && s.ids[first - 1] == id) return;  // it began in an earlier tile
  int tiles = 0;  // that the run reaches into after this one; each warp looks at 32 of them at a time
  for (unsigned all = 0xffffffffu; all == 0xffffffffu; tiles += __popc(all)) {
    const int64_t at = next + static_cast<int64_t>(tiles + threadIdx.x % 32) * s.tile;
    all = __ballot_sync(0xffffffffu, at < s.n && s.ids[at] == id);
  }
  const int column = threadIdx.x * V;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * blockDim.x * V + column;
  float sum[V] = {};
  if (c < d) {
#pragma unroll 4
    for (int i = threadIdx.y; i <= tiles; i += kParts) {
      float v[V];
      load(v, edges + (int64_t{2} * (blockIdx.x + i) + (i == 0 ? 1 : 0)) * d + c);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += v[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; k++) partial[threadIdx.y * blockDim.x * V + column + k] = sum[k];
  __syncthreads();
  if (threadIdx.y != 0 || c >= d) return;
  float v[V];
  load(v, dtable + id * d + c);
#pragma unroll
  for (int k = 0; k < V; k++) {
    for (int part = 1; part < kParts; part++) sum[k] += partial[part * blockDim.x * V + column + k];
    v[k] += sum[k];
  }
  store(dtable + id * d + c, v);
}

Sorted sort_ids(const Context& ctx, Scratch& scratch, const int32_t* ids, int64_t n, int64_t n_vocab) {
  int bits = 1;
  while ((int64_t{1} << bits) - 1 < n_vocab) bits++;
  if (bits > kIdBits) fail("embedding backward", "more than 2^20 - 1 ids", __FILE__, __LINE__);
  const auto chunks = static_cast<unsigned>(div_up(n, kChunk));
  auto *sorted = scratch.take<int32_t>(static_cast<size_t>(n)), *order = scratch.take<int32_t>(static_cast<size_t>(n));
  auto* keys = scratch.take<uint32_t>(size_t{chunks} * kChunk);
  const int count = static_cast<int>(n);
  const unsigned merge_blocks = kChunk / 256 * chunks;
  sort_chunk_kernel<<<chunks, kSortThreads, 0, ctx.stream>>>(keys, ids, count, bits);
  MM_CUDA_LAUNCHED();
  merge_kernel<<<merge_blocks, 256, 0, ctx.stream>>>(sorted, order, keys, count);
  MM_CUDA_LAUNCHED();
  return {sorted, order, count, 0};
}

constexpr int kTile = 32, kBatch = 4, kParts = 1;

template <class T, int V>
void add_rows(const Context& ctx, Scratch& scratch, float* dtable, const T* dout, Sorted s, int64_t d) {
  s.tile = kTile;
  while (div_up(s.n, s.tile) * 2 * d * 4 + 256 > static_cast<int64_t>(scratch.left()) && s.tile < 4096) s.tile *= 2;
  const auto tiles = static_cast<unsigned>(div_up(s.n, s.tile));
  auto* edges = scratch.take<float>(static_cast<size_t>(tiles) * 2 * static_cast<size_t>(d));
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(256, div_up(div_up(d, V), 32) * 32));
  const auto columns = static_cast<unsigned>(div_up(d, threads * V));
  tile_kernel<T, V, kBatch>
      <<<dim3(tiles, columns), threads, static_cast<size_t>(s.tile) * 8, ctx.stream>>>(dtable, edges, dout, s, d);
  MM_CUDA_LAUNCHED();
  if (tiles == 1) return;
  edge_kernel<V, kParts>
      <<<dim3(tiles - 1, columns), dim3(threads, kParts), kParts * threads * V * sizeof(float), ctx.stream>>>(
          dtable, edges, s, d);
  MM_CUDA_LAUNCHED();
}

}  // namespace

void embed_fwd(const Context& ctx, DType t, void* out, const void* table, const int32_t* ids, int64_t n, int64_t d) {
  if (n == 0 || d == 0) return;
  const int warps = n <= ctx.n_sm ? 1 : 8;
  const auto blocks = static_cast<unsigned>(div_up(n, warps));
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    auto* y = static_cast<T*>(out);
    const auto* x = static_cast<const T*>(table);
    if (d % per_16_bytes<T> == 0 && aligned({out, table}))
      fwd_kernel<T, per_16_bytes<T>><<<blocks, warps * 32, 0, ctx.stream>>>(y, x, ids, n, d);
    else fwd_kernel<T, 1><<<blocks, warps * 32, 0, ctx.stream>>>(y, x, ids, n, d);
  });
  MM_CUDA_LAUNCHED();
}

void embed_scaled(const Context& ctx, void* out, const ScaledRows& next, const void* table, const int32_t* ids,
                  int64_t m, int64_t d) {
  if (m == 0 || d == 0) return;
  const auto threads = static_cast<unsigned>(std::min<int64_t>(256, div_up(d, 256) * 32));
  launch_overlapped(ctx, scaled_kernel, dim3(static_cast<unsigned>(m)), threads, 0, 1, static_cast<bf16*>(out), next,
                    static_cast<const bf16*>(table), ids, d);
}

void embed_bwd(const Context& ctx, DType t, float* dtable, const void* dout, const int32_t* ids, int64_t n, int64_t d,
               int64_t n_vocab) {
  if (n == 0 || d == 0) return;
  Scratch scratch(ctx);
  const Sorted s = sort_ids(ctx, scratch, ids, n, n_vocab);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    const auto* x = static_cast<const T*>(dout);
    if (d % 4 == 0 && aligned({dtable}) && aligned({dout}, 4 * sizeof(T)))
      add_rows<T, 4>(ctx, scratch, dtable, x, s, d);
    else add_rows<T, 1>(ctx, scratch, dtable, x, s, d);
  });
}

}  // namespace mm::cuda
