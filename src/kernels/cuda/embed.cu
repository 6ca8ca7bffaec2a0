// Embedding. Forward copies rows of the table. Backward adds row t of dout [n, d] to row ids[t] of dtable [n_vocab, d]:
// many rows go to few places (ids follow Zipf's law) and the order of the sums must not depend on the machine, so the
// positions are sorted by id (stable radix sort) and summed tile by tile:
//
//   sorted  |a a a a b|b b b b b|b c d d e|e f ...     tiles of kTile positions, one block each
//            run of a: inside a tile, added to dtable by its block
//            run of b: crosses tiles; tile 0 leaves `tail`, tiles 1 and 2 leave `head` in ctx.scratch, and a second
//            kernel adds them up, tile after tile, and adds the sum to dtable
//
// Every row of dtable is written by one block only. A thread owns 4 columns and loads 8 rows (and the rows of dtable
// that end there) at once. Ids of -1 sort to the end and are skipped. Bytes: n d sizeof(T) + 2 * 4 d * (different ids)
// + the sort's few.
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

constexpr int kBatch = 8;  // rows in flight a thread

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

__global__ void iota_kernel(int32_t* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = static_cast<int32_t>(i);
}

struct Sorted {
  const int32_t* ids;    // [n] ascending, -1 last
  const int32_t* order;  // [n] positions before the sort
  int n, tile;
};

// blockDim.x * V columns from blockIdx.y on; blockIdx.x is the tile. `edges` [tiles][2][d]: head and tail.
template <class T, int V>
__global__ void tile_kernel(float* dtable, float* edges, const T* dout, Sorted s, int64_t d) {
  extern __shared__ int32_t shared[];  // [tile] row of dout, [tile] id where its run ends within the tile, else -1
  int32_t *rows = shared, *ends = shared + s.tile;
  const int first = blockIdx.x * s.tile, count = min(s.tile, s.n - first);
  for (int i = threadIdx.x; i < s.tile; i += blockDim.x) {
    const int at = first + i;
    const int32_t id = i < count ? s.ids[at] : -1;
    const bool end = id >= 0 && (i == count - 1 || s.ids[at + 1] != id);
    rows[i] = id >= 0 ? s.order[at] : -1;
    ends[i] = end ? id : -1;
  }
  __syncthreads();
  const int32_t before = first > 0 ? s.ids[first - 1] : -1, after = first + count < s.n ? s.ids[first + count] : -1;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= d) return;
  float sum[V] = {};
  for (int i0 = 0; i0 < s.tile; i0 += kBatch) {
    Raw<T, V> x[kBatch] = {};
    Raw<float, V> old[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      if (rows[i0 + j] < 0) continue;
      x[j].load(dout + rows[i0 + j] * d + c);
      const int32_t id = ends[i0 + j];
      if (id >= 0 && id != before && id != after) old[j].load(dtable + id * d + c);
    }
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      float v[V];
      x[j].get(v);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += v[k];
      const int32_t id = ends[i0 + j];
      if (id < 0) continue;
      if (id == before || id == after) {  // began before: head, whether or not it goes on
        store(edges + (int64_t{2} * blockIdx.x + (id == before ? 0 : 1)) * d + c, sum);
      } else {
        old[j].get(v);
#pragma unroll
        for (int k = 0; k < V; k++) v[k] += sum[k];
        store(dtable + id * d + c, v);
      }
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] = 0;
    }
  }
}

// The run that begins in tile blockIdx.x and goes on in the next: its tail and the heads that follow, in kParts
// interleaved sums.
constexpr int kParts = 4;
template <int V>
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

// Keys are the ids as unsigned numbers: -1 has all bits set, and `bits` is large enough that this is above every id.
Sorted sort_ids(const Context& ctx, Scratch& scratch, const int32_t* ids, int64_t n, int64_t n_vocab) {
  const auto count = static_cast<size_t>(n);
  auto* keys = scratch.take<uint32_t>(count);
  auto *order = scratch.take<int32_t>(count), *iota = scratch.take<int32_t>(count);
  iota_kernel<<<static_cast<unsigned>(div_up(n, 256)), 256, 0, ctx.stream>>>(iota, n);
  MM_CUDA_LAUNCHED();
  int bits = 1;
  while ((int64_t{1} << bits) - 1 < n_vocab) bits++;
  size_t bytes = 0;
  const auto* in = reinterpret_cast<const uint32_t*>(ids);
  const int items = static_cast<int>(n);
  MM_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(nullptr, bytes, in, keys, iota, order, items, 0, bits, ctx.stream));
  void* temp = scratch.take<char>(bytes);
  MM_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temp, bytes, in, keys, iota, order, items, 0, bits, ctx.stream));
  return {reinterpret_cast<const int32_t*>(keys), order, items, 0};
}

template <class T, int V>
void add_rows(const Context& ctx, Scratch& scratch, float* dtable, const T* dout, Sorted s, int64_t d, int tile) {
  while (div_up(s.n, tile) * 2 * d * 4 + 256 > static_cast<int64_t>(scratch.left()) && tile < 4096) tile *= 2;
  s.tile = tile;
  const auto tiles = static_cast<unsigned>(div_up(s.n, tile));
  auto* edges = scratch.take<float>(static_cast<size_t>(tiles) * 2 * static_cast<size_t>(d));
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(256, div_up(div_up(d, V), 32) * 32));
  const auto columns = static_cast<unsigned>(div_up(d, threads * V));
  tile_kernel<T, V>
      <<<dim3(tiles, columns), threads, static_cast<size_t>(tile) * 8, ctx.stream>>>(dtable, edges, dout, s, d);
  MM_CUDA_LAUNCHED();
  if (tiles == 1) return;
  edge_kernel<V><<<dim3(tiles - 1, columns), dim3(threads, kParts), kParts * threads * V * sizeof(float), ctx.stream>>>(
      dtable, edges, s, d);
  MM_CUDA_LAUNCHED();
}

constexpr int kTile = 32;

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

void embed_bwd(const Context& ctx, DType t, float* dtable, const void* dout, const int32_t* ids, int64_t n, int64_t d,
               int64_t n_vocab) {
  if (n == 0 || d == 0) return;
  Scratch scratch(ctx);
  const Sorted s = sort_ids(ctx, scratch, ids, n, n_vocab);
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    const auto* x = static_cast<const T*>(dout);
    if (d % 4 == 0 && aligned({dtable}) && aligned({dout}, 4 * sizeof(T)))
      add_rows<T, 4>(ctx, scratch, dtable, x, s, d, kTile);
    else add_rows<T, 1>(ctx, scratch, dtable, x, s, d, kTile);
  });
}

}  // namespace mm::cuda
