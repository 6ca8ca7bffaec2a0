// Attention of few query rows against many keys that lie in pages: out = softmax(scale q k^T) v.
//
// paged_kernel (bf16 and f16 with keys and values of the same type or int8): tensor cores, with the keys of a tile as
// the rows of the product, so that all query heads of a key head (up to 8 columns) share what is loaded:
//
//   S^T [16 keys, 8 heads] = K [16, D] Q^T        mma.m16n8k16, D / 16 of them
//   O^T [D, 8 heads]      += V^T [D, 16] P^T      the same; P^T from S^T by movmatrix
//
// Which elements of D stand at which place of the reduction (K) or of the rows (V^T) is free, so each lane takes pieces
// of 4 to 16 bytes from the rows as they lie (lane = 4 g + m):
//   keys    g and g + 8:                    elements 32 c + 8 m .. + 8 of each 32
//   values  2m, 2m + 1, 2m + 8, 2m + 9:     elements 8 VE c + VE g .. + VE, VE = 8 (D 64, 128) or 4 (D 32, 96); two
//           keys' words are interleaved by one permutation of bytes
// int8 becomes bf16 exactly by (0x4300 | low 7 bits) - (0x4300 | sign bit); the scales of keys multiply S, those of
// values P.
//
// Tiles of 16 keys are dealt out to the warps of a cluster of blocks (sm_90 and up; elsewhere of blocks whose parts a
// second kernel merges). A warp copies its tiles into a ring of its own in shared memory, 16 bytes at a time past the
// first-level cache (which would be too small for what must be under way), so blocks have no barriers before the merge.
// The row numbers of a tile are looked up one tile ahead of its copies. Partial results merge in a fixed order as in
// attention_decode.cu.
//
// Bytes: 2 d_head sizeof(C) a key and key head (int8: + 8).
//
// Measured on an H100 in a graph, keys not in L2, bf16 / int8 keys (us): H8/4 d96 1 x 100 2.5 / 2.9, 1 x 1,000 4.2 /
// 4.2, 1 x 4,000 7.7 / 8.1, 16 x 1,000 12.7 / 10.8, 32 x 500 11.5 / 9.4, 96 x 200 13.6 / 10.2, 96 x 500 29.5 (2.5 TB/s)
// / 21.2; 96 x 1,000 H8/2 d64 21.6 / 16.0; 128 x 1,000 H8/2 d128 51 / 31. `invariant`: 1 x 1,000 7.2, 96 x 200 20.9.
// Slower: copies of 4 and 8 bytes by the thread that uses them (they pass through the first-level cache, which is small
// beside 200 KB of shared memory: 96 x 500 int8 29.6), two parts a row where there are more rows than SMs (17.6 for 96
// x 200), 16 warps a block there (17.7), without the prefetch and overlap 1 x 1,000 5.6.
//
// With `qkv` the same launch norms and rotates q and the row's own key, which it uses and writes to the pool: then no
// key that it loads is of this step, and all are on their way before the kernel waits for the one before it.
//
// plain_kernel: everything else (fp32, mixed formats), a block a (row, head), fp32 arithmetic.
#include "kernels/cuda/attention_paged.cuh"

namespace mm::cuda {
namespace {

// Where there are no clusters.
template <class T, int D>
__global__ void __launch_bounds__(D)
    merge_kernel(const __grid_constant__ PagedAttention a, int n_split, const float* part) {
  const int head = static_cast<int>(blockIdx.x), c = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.y;
  if (a.n_key[row] <= 0) return;
  const float* from = part + (row * a.n_head + head) * n_split * (D + 2);
  float best = minus_infinity(), l = 0.0f, x = 0.0f;
  for (int r = 0; r < n_split; r++) best = fmaxf(best, from[r * (D + 2)]);
  for (int r = 0; r < n_split; r++) {
    const float f = exp2_fast(from[r * (D + 2)] - reference(best));
    l += f * from[r * (D + 2) + 1];
    x += f * from[r * (D + 2) + 2 + c];
  }
  static_cast<T*>(a.out)[row * a.ldo + head * D + c] = from_float<T>(x / l);
}

// A block a (head, row), a warp a key at a time, D / 32 elements a lane.
constexpr int plain_warps = 8;

template <class T, class C, int D>
__global__ void __launch_bounds__(plain_warps * 32)
    plain_kernel(const __grid_constant__ PagedAttention a, const __grid_constant__ KvLayer kv, float scale2) {
  constexpr int E = D / 32, unroll = 4;
  __shared__ float warp_ml[2][plain_warps], warp_out[plain_warps][D];
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (a.n_head / a.n_kv_head);
  const int64_t row = blockIdx.y;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int n_key = a.n_key[row];
  const int32_t* table = a.table + a.seq[row] * a.table_ld;
  float q[E], out[E] = {}, top = minus_infinity(), sum = 0.0f;
#pragma unroll
  for (int e = 0; e < E; e++)
    q[e] = to_float(static_cast<const T*>(a.q)[row * a.ldq + head * D + e * 32 + lane]) * scale2;
  for (int first = warp * unroll; first < n_key; first += plain_warps * unroll) {
    float s[unroll], v[unroll][E];
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const int key = min(first + u, n_key - 1);
      const int64_t at =
          static_cast<int64_t>(table[key >> a.block_shift] + static_cast<int>(key & ((1u << a.block_shift) - 1))) *
              a.n_kv_head +
          kv_head;
      s[u] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; e++) {
        if constexpr (sizeof(C) == 1) {
          s[u] += q[e] * static_cast<float>(static_cast<const C*>(kv.k)[at * D + e * 32 + lane]);
          v[u][e] = static_cast<float>(static_cast<const C*>(kv.v)[at * D + e * 32 + lane]) * kv.v_scale[at];
        } else {
          s[u] += q[e] * to_float(static_cast<const C*>(kv.k)[at * D + e * 32 + lane]);
          v[u][e] = to_float(static_cast<const C*>(kv.v)[at * D + e * 32 + lane]);
        }
      }
      if constexpr (sizeof(C) == 1) s[u] *= kv.k_scale[at];
    }
    float best = top;
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      s[u] = warp_sum(s[u]);
      if (first + u >= n_key) s[u] = minus_infinity();
      best = fmaxf(best, s[u]);
    }
    const float f = exp2f(top - reference(best));
    top = best, sum *= f;
#pragma unroll
    for (int e = 0; e < E; e++) out[e] *= f;
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const float p = first + u < n_key ? exp2f(s[u] - reference(top)) : 0.0f;
      sum += p;
#pragma unroll
      for (int e = 0; e < E; e++) out[e] += first + u < n_key ? p * v[u][e] : 0.0f;
    }
  }
  if (lane == 0) warp_ml[0][warp] = top, warp_ml[1][warp] = sum;
#pragma unroll
  for (int e = 0; e < E; e++) warp_out[warp][e * 32 + lane] = out[e];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < D; c += plain_warps * 32) {
    float best = minus_infinity(), l = 0.0f, x = 0.0f;
    for (int w = 0; w < plain_warps; w++) best = fmaxf(best, warp_ml[0][w]);
    for (int w = 0; w < plain_warps; w++) {
      const float f = exp2f(warp_ml[0][w] - reference(best));
      l += f * warp_ml[1][w], x += f * warp_out[w][c];
    }
    static_cast<T*>(a.out)[row * a.ldo + head * D + c] = from_float<T>(n_key > 0 ? x / l : 0.0f);
  }
}

// Can a kernel rotate what it attends with? Heads of 8 elements a lane.
constexpr bool room_for_heads(int d, int heads) { return d >= 64 && d * heads <= 256; }

template <class T, class C, int D, int kHeads, int kWarps, int kStages, int kBlocks, bool kRope>
void launch_kernel(const Context& ctx, const KvLayer& kv, const PagedAttention& a, int n_split) {
  constexpr int shared = Ring<C, D, kWarps, kStages>::bytes;
  const auto kernel = paged_kernel<T, C, D, kHeads, kWarps, kStages, kBlocks, kRope>;
  static const cudaError_t once = [&] {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    return e != cudaSuccess ? e : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }();
  MM_CUDA_CHECK(once);
  const dim3 grid(static_cast<unsigned>(n_split), static_cast<unsigned>(a.n_head / kHeads),
                  static_cast<unsigned>(a.n_row));
  const float scale2 = a.scale * log2_e;
  if (ctx.arch >= 90 || n_split == 1)
    return launch_overlapped(ctx, kernel, grid, kWarps * 32, shared, static_cast<unsigned>(n_split), a, kv, scale2,
                             n_split, nullptr);
  auto* part =
      Scratch(ctx).take<float>(static_cast<size_t>(a.n_row) * static_cast<size_t>(a.n_head * n_split * (D + 2)));
  kernel<<<grid, kWarps * 32, shared, ctx.stream>>>(a, kv, scale2, n_split, part);
  MM_CUDA_LAUNCHED();
  merge_kernel<T, D>
      <<<dim3(static_cast<unsigned>(a.n_head), static_cast<unsigned>(a.n_row)), D, 0, ctx.stream>>>(a, n_split, part);
  MM_CUDA_LAUNCHED();
}
template <class T, class C, int D, int kHeads, int kWarps, int kStages, int kBlocks>
void launch(const Context& ctx, const KvLayer& kv, const PagedAttention& a, int n_split) {
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<C, bf16> && room_for_heads(D, kHeads)) {
    if (a.qkv != nullptr) return launch_kernel<T, C, D, kHeads, kWarps, kStages, kBlocks, true>(ctx, kv, a, n_split);
  }
  launch_kernel<T, C, D, kHeads, kWarps, kStages, kBlocks, false>(ctx, kv, a, n_split);
}

template <class T, class C, int D>
void launch_for_group(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  const int group = a.n_head / a.n_kv_head;
  const auto with_heads = [&](auto heads) {
    constexpr int kHeads = heads.value;
    const int64_t pairs = a.n_row * (a.n_head / kHeads);
    const bool large = ctx.arch == 90 || ctx.arch == 100;  // 227 KB of shared memory a block; else 99 or more
    if (a.invariant) {
      if constexpr (sizeof(C) == 2) {
        if (D == 128 || !large) return launch<T, C, D, kHeads, 4, 2, 2>(ctx, kv, a, invariant_split);
      }
      if constexpr (sizeof(C) == 1 || D < 128) launch<T, C, D, kHeads, 8, 2, 2>(ctx, kv, a, invariant_split);
      return;
    }
    // As many parts as leave each block an SM of its own and its warps a tile.
    int n_split = 1;
    while (n_split < max_split && 2 * n_split * pairs <= ctx.n_sm && n_split * 8 * 16 < a.max_key) n_split *= 2;
    if constexpr (sizeof(C) == 1) {
      if (large && n_split * pairs <= ctx.n_sm && a.max_key > n_split * 128)
        return launch<T, C, D, kHeads, 16, 2, 1>(ctx, kv, a, n_split);
      return launch < T, C, D, kHeads, 8, 2, D == 128 ? 2 : 3 > (ctx, kv, a, n_split);  // as the registers allow
    } else if constexpr (D == 128) {
      if (large) return launch<T, C, D, kHeads, 4, 3, 2>(ctx, kv, a, n_split);
      return launch<T, C, D, kHeads, 4, 2, 2>(ctx, kv, a, n_split);
    } else {
      // Few keys: four blocks an SM instead of a second wave. With room for all at once, three stages (64 rows x 100
      // and 250 keys inside a step 180 -> 173.5 and 220 -> 210 us).
      if (pairs > 3 * ctx.n_sm && a.max_key <= 256) return launch<T, C, D, kHeads, 4, 2, 3>(ctx, kv, a, n_split);
      if (pairs > ctx.n_sm || !large) return launch<T, C, D, kHeads, 4, 3, 3>(ctx, kv, a, n_split);
      if (large && a.max_key > n_split * 256) return launch<T, C, D, kHeads, 16, 2, 1>(ctx, kv, a, n_split);
      return launch<T, C, D, kHeads, 8, 2, 2>(ctx, kv, a, n_split);
    }
  };
  if (group % 8 == 0) return with_heads(std::integral_constant<int, 8>{});
  if (group % 4 == 0) return with_heads(std::integral_constant<int, 4>{});
  if (group % 2 == 0) return with_heads(std::integral_constant<int, 2>{});
  with_heads(std::integral_constant<int, 1>{});
}

template <class T, class C, int D>
void attention(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  if constexpr (sizeof(T) == 2 && (std::is_same_v<T, C> || sizeof(C) == 1)) {
    if (aligned({a.q, kv.k, kv.v}) && a.ldq % 8 == 0) return launch_for_group<T, C, D>(ctx, kv, a);
  }
  const dim3 grid(static_cast<unsigned>(a.n_head), static_cast<unsigned>(a.n_row));
  plain_kernel<T, C, D><<<grid, plain_warps * 32, 0, ctx.stream>>>(a, kv, a.scale * log2_e);
  MM_CUDA_LAUNCHED();
}

template <class T, class C>
void attention_of(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  switch (a.d_head) {
    case 32: return attention<T, C, 32>(ctx, kv, a);
    case 64: return attention<T, C, 64>(ctx, kv, a);
    case 96: return attention<T, C, 96>(ctx, kv, a);
    case 128: return attention<T, C, 128>(ctx, kv, a);
    default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
  }
}

}  // namespace

bool attention_paged_ropes(const Context& ctx, DType t, const KvLayer& kv, const PagedAttention& a) {
  const int group = a.n_head / a.n_kv_head, heads = group % 8 == 0 ? 8 : group % 4 == 0 ? 4 : group % 2 == 0 ? 2 : 1;
  return ctx.arch >= 90 && t == DType::bf16 && kv.format == KvFormat::bf16 && !a.invariant &&
         room_for_heads(a.d_head, heads) && aligned({a.qkv, kv.k, kv.v}) &&
         aligned({a.rope.q_weight, a.rope.k_weight, a.rope.cos, a.rope.sin});
}

void attention_paged(const Context& ctx, DType t, const KvLayer& kv, const PagedAttention& a) {
  if (a.n_row == 0) return;
  dispatch(t, [&]<class T>(T) {
    switch (kv.format) {
      case KvFormat::f32: return attention_of<T, float>(ctx, kv, a);
      case KvFormat::bf16: return attention_of<T, bf16>(ctx, kv, a);
      case KvFormat::f16: return attention_of<T, f16>(ctx, kv, a);
      case KvFormat::i8: return attention_of<T, int8_t>(ctx, kv, a);
    }
  });
}

}  // namespace mm::cuda
