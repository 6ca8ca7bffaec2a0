// Attention as three kernels with the scores in memory: what attention looked like before it was fused, kept for the
// course to compare with. The products run on tensor cores, so what differs is the memory alone.
//
//   scores[i, j] = scale q_i k_j, -inf above the diagonal     fp32, all of [len, len]
//   weights = softmax(scores)                                 in place, rounded to T at the head of each row
//   out = weights v
//
// For each (sequence, head) L x L floats of ctx.scratch, L the longest length rounded up to 64; as many of them at a
// time as fit. Memory: about 4 + 4 + 2 + 2 bytes a score, against none for the fused kernels. Measured on an H100,
// bf16: B32 T768 H8/4 d96 1.17 ms (fused: 0.12), B16 T2048 H8/2 d64 5.3 ms (fused: 0.22).
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace mm::cuda {

namespace {

constexpr int n_warp = 4, n_thread = 32 * n_warp, block = 64;  // tiles of block x block scores, 16 rows a warp

// Of pair `first + z`, the pairs being (sequence, head) in that order.
struct Pair {
  int head, q0, len;
  __device__ __forceinline__ Pair(const Attention& a, int64_t first, unsigned z) {
    const int64_t i = first + z, s = i / a.n_head;
    head = static_cast<int>(i % a.n_head), q0 = a.cu[s], len = a.cu[s + 1] - q0;
  }
};

template <class T, int D>
__global__ void __launch_bounds__(n_thread)
    naive_scores_kernel(const __grid_constant__ Attention a, float* scores, int64_t length, int64_t first_pair) {
  const Pair pair(a, first_pair, blockIdx.z);
  const int row0 = static_cast<int>(blockIdx.y) * block, key0 = static_cast<int>(blockIdx.x) * block;
  if (row0 >= pair.len || key0 >= pair.len) return;
  __shared__ __align__(128) unsigned char shared[2 * block * 2 * D];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int kv_head = pair.head / (a.n_head / a.n_kv_head);
  const uint32_t qs = shared_address(shared), ks = qs + block * 2 * D;
  copy_rows_async<D, block, n_thread>(qs, static_cast<const T*>(a.q) + (pair.q0 + row0) * a.ldq + pair.head * D, a.ldq,
                                      pair.len - row0, tid);
  copy_rows_async<D, block, n_thread>(ks, static_cast<const T*>(a.k) + (pair.q0 + key0) * a.ldk + kv_head * D, a.ldk,
                                      pair.len - key0, tid);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const FragmentAddress<D> rows(qs, Pattern::rows, lane), cols(ks, Pattern::cols, lane);
  float s[block / 8][4] = {};
#pragma unroll
  for (int c = 0; c < D / 16; c++) {
    uint32_t x[4];
    ldmatrix(x, rows.at(0, c) + static_cast<uint32_t>(warp * 16 * RowLayout<D>::bytes));
#pragma unroll
    for (int j = 0; j < block / 16; j++) {
      uint32_t y[4];
      ldmatrix(y, cols.at(16 * j, c));
      mma<T>(s[2 * j], x, y[0], y[1]);
      mma<T>(s[2 * j + 1], x, y[2], y[3]);
    }
  }
  float* const to = scores + static_cast<int64_t>(blockIdx.z) * length * length;
#pragma unroll
  for (int c = 0; c < block / 8; c++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row0 + warp * 16 + half * 8 + lane / 4, key = key0 + c * 8 + lane % 4 * 2;
      const float2 x = {key > row ? minus_infinity() : s[c][2 * half] * a.scale,
                        key + 1 > row ? minus_infinity() : s[c][2 * half + 1] * a.scale};
      *reinterpret_cast<float2*>(to + row * length + key) = x;
    }
  }
}

// One warp a row. The row's weights as T take the place of the first half of its scores: what is written was read.
template <class T>
__global__ void __launch_bounds__(n_thread)
    naive_softmax_kernel(const __grid_constant__ Attention a, float* scores, int64_t length, int64_t first_pair) {
  const Pair pair(a, first_pair, blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * n_warp + static_cast<int>(threadIdx.x) / 32;
  if (row >= pair.len) return;
  float* const s = scores + (static_cast<int64_t>(blockIdx.z) * length + row) * length;
  T* const p = reinterpret_cast<T*>(s);
  const int end = (pair.len + block - 1) / block * block;  // scores beyond the length were never written usefully
  float m = minus_infinity(), l = 0.0f;
  for (int j = lane; j < pair.len; j += 32) m = fmaxf(m, s[j]);
  m = warp_max(m);
  for (int j = lane; j < pair.len; j += 32) l += expf(s[j] - m);
  l = warp_sum(l);
  for (int j = lane; j < end; j += 32) {
    const float x = j < pair.len ? expf(s[j] - m) / l : 0.0f;
    __syncwarp();
    p[j] = from_float<T>(x);
    __syncwarp();
  }
  if (a.lse != nullptr && lane == 0) a.lse[static_cast<int64_t>(pair.q0 + row) * a.n_head + pair.head] = m + logf(l);
}

template <class T, int D>
__global__ void __launch_bounds__(n_thread)
    naive_output_kernel(const __grid_constant__ Attention a, const float* scores, int64_t length, int64_t first_pair) {
  const Pair pair(a, first_pair, blockIdx.z);
  const int row0 = static_cast<int>(blockIdx.x) * block;
  if (row0 >= pair.len) return;
  __shared__ __align__(128) unsigned char shared[2 * block * (block + D)];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int kv_head = pair.head / (a.n_head / a.n_kv_head);
  const uint32_t ps = shared_address(shared), vs = ps + 2 * block * block;
  const FragmentAddress<block> weights(ps, Pattern::rows, lane);
  const FragmentAddress<D> values(vs, Pattern::rows, lane);
  const T* p = reinterpret_cast<const T*>(scores + (static_cast<int64_t>(blockIdx.z) * length + row0) * length);
  float o[1][D / 8][4] = {};
  for (int key0 = 0; key0 < pair.len; key0 += block) {
    __syncthreads();
    copy_rows_async<block, block, n_thread>(ps, p + key0, 2 * length, pair.len - row0, tid);
    copy_rows_async<D, block, n_thread>(vs, static_cast<const T*>(a.v) + (pair.q0 + key0) * a.ldv + kv_head * D, a.ldv,
                                        pair.len - key0, tid);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < block / 16; j++) {
      uint32_t x[4];
      ldmatrix(x, weights.at(0, j) + static_cast<uint32_t>(warp * 16 * RowLayout<block>::bytes));
#pragma unroll
      for (int c = 0; c < D / 16; c++) {
        uint32_t y[4];
        ldmatrix_transposed(y, values.at(16 * j, c));
        mma<T>(o[0][2 * c], x, y[0], y[1]);
        mma<T>(o[0][2 * c + 1], x, y[2], y[3]);
      }
    }
  }
  __syncthreads();
  const float one[2] = {1.0f, 1.0f};
  T* out = static_cast<T*>(a.out) + (pair.q0 + row0 + warp * 16) * a.ldo + pair.head * D;
  store_rows<D, 1>(out, a.ldo, pair.len - row0 - warp * 16,
                   shared + 2 * block * block + warp * 16 * RowLayout<D>::bytes, lane, o, one);
}

int64_t padded_length(const Attention& a) { return div_up(a.max_len, block) * block; }

template <class T, int D>
void launch(const Context& ctx, const Attention& a) {
  const int64_t length = padded_length(a), n_pair = a.n_seq * a.n_head, tiles = length / block;
  const int64_t fit =
      std::min<int64_t>(static_cast<int64_t>(ctx.scratch_bytes / sizeof(float)) / (length * length), 65535);
  auto* scores = static_cast<float*>(ctx.scratch);
  for (int64_t first = 0; first < n_pair; first += fit) {
    const auto n = static_cast<unsigned>(std::min(fit, n_pair - first)), t = static_cast<unsigned>(tiles);
    naive_scores_kernel<T, D><<<dim3(t, t, n), n_thread, 0, ctx.stream>>>(a, scores, length, first);
    MM_CUDA_LAUNCHED();
    const auto softmax_blocks = static_cast<unsigned>(length / n_warp);
    naive_softmax_kernel<T><<<dim3(softmax_blocks, 1, n), n_thread, 0, ctx.stream>>>(a, scores, length, first);
    MM_CUDA_LAUNCHED();
    naive_output_kernel<T, D><<<dim3(t, 1, n), n_thread, 0, ctx.stream>>>(a, scores, length, first);
    MM_CUDA_LAUNCHED();
  }
}

}  // namespace

bool naive_attention_supported(const Context& ctx, const Attention& a) {
  const auto length = static_cast<size_t>(padded_length(a));
  return length > 0 && a.kv_start == nullptr && a.kv_len == nullptr &&
         length * length * sizeof(float) <= ctx.scratch_bytes;
}

void naive_attention_fwd(const Context& ctx, DType t, const Attention& a) {
  const auto run = [&]<class T>(T) {
    switch (a.d_head) {
      case 32: return launch<T, 32>(ctx, a);
      case 64: return launch<T, 64>(ctx, a);
      case 96: return launch<T, 96>(ctx, a);
      case 128: return launch<T, 128>(ctx, a);
      default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
    }
  };
  t == DType::bf16 ? run(bf16{}) : run(f16{});
}

}  // namespace mm::cuda
