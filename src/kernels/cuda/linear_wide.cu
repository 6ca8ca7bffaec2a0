// y [m, n] = f(x [m, k] w^T / rms) (+ residual) in bf16 for up to 128 tokens of a decode step on a Hopper (TMA,
// wgmma), with what is left of the RMSNorm before, and the SwiGLU or the residual behind, in the same launch:
//
//   tile      kTiles times 64 weight rows, the rows of wgmma m64nNk16 (with SwiGLU half of them of the gate, half of
//             `up`), and N tokens, its columns; those behind the last arrive as zeros
//   k         all of it in one block where w's tile fits its shared memory, else split over the P blocks of a cluster
//   warps     0 to 3 multiply, 4 to 7 add up squares and help to write, 8 copies
//   overlap   all of a block's weights are copied before the kernel waits for the one before it; behind the wait are
//             x, the products and the sums
//   x         passes through a ring, from memory to the tensor cores as it is. To use a slot again costs some 1,000
//             clocks, so where x does not fit beside w, the last steps of w take the place of the first ones instead
//   norm      who writes x [m, d] also writes x times the norm's weight (one rounding) and the sums of squares of its
//             tiles of 64 columns (a tree over 16 lanes), so a product only adds up d / 64 numbers a token, in order,
//             and multiplies its sums by 1 / rms. (Norming in every product, on what the ring held, and slow
//             division in SwiGLU: gate and up of 96 tokens 10,850 clocks behind the wait instead of 6,750.)
//   P > 1     a block sends each other one its part of the 8 s tokens that that one finishes, into memory that nothing
//             else uses, as the registers hold it, and a barrier counts the bytes that have come; parts are added in
//             their order
//
// Bytes: w once from memory, and once for each tile of tokens from L2; x once a block, which is why the tokens are
// split: behind the wait an SM takes in some 30 bytes a clock.
//
// Step of the 64M model on an H100, keys 100 (us; before: norm, library, activation and attention one after another):
// 33 tokens 158 (264), 48 168 (281), 64 181 (289), 96 208 (315), 128 239 (343). Slower: asking L2 for weights of later
// products 2 to 4 %, each block beginning at another place of k 1 to 2 %, slots of 64 columns for all products 3 to
// 6 %, parts exchanged with cluster barriers in place of counted bytes 1,500 clocks a launch.
//
// A row's bits depend on m alone, not on the other rows.
#include <algorithm>

#include "kernels/cuda/hopper_gemm_ops.cuh"
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace mm::cuda {
namespace {

constexpr int n_thread = 288;
constexpr int tile_rows = 64, block_k = 128, max_steps = 20, max_slots = 12, max_tokens = 128, max_parts = 4;
constexpr int w_tile = tile_rows * block_k * 2, max_shared = 227 << 10, two_blocks = (228 << 10) / 2 - 1024;

// Columns of k a slot of the ring: few large copies, but enough of them under way beside many weights.
__host__ __device__ constexpr int slot_k(int tiles, bool swiglu) { return tiles == 2 || swiglu ? 64 : 128; }
__host__ __device__ constexpr int slot_bytes(int tiles, bool swiglu, int columns) {
  return columns * slot_k(tiles, swiglu) * 2;
}
// Rows of the output a block, and rows of sums that it stages for it: one tile with SwiGLU is half gate, half up.
__host__ __device__ constexpr int rows_out(int tiles, bool swiglu) { return tiles * tile_rows / (swiglu ? 2 : 1); }
__host__ __device__ constexpr int rows_staged(int tiles, bool swiglu) { return swiglu ? tile_rows : tiles * tile_rows; }
__host__ __device__ constexpr int groups_of(int columns, int parts) {
  return (columns / 8 + parts - 1) / parts;
}  // of 8 tokens a block ends
__host__ __device__ constexpr int sent_bytes(int columns, int parts) {
  return (parts - 1) * groups_of(columns, parts) * 128 * 16;
}
constexpr int barrier_bytes = 512, factor_bytes = max_tokens / 2 * 4;
static_assert((max_steps + 2 * max_slots + 1) * 8 <= barrier_bytes);

// How a product is spread over the GPU; columns 0: it does not fit.
struct Spread {
  int tiles = 1, columns = 0, parts = 1, slots = 0;
  int steps = 0;  // of block_k, the most of a block
  int late = 0;   // of them, weights that take the place of the first ones
  int tail = 0, shared = 0;
};

struct WideParams {
  CUtensorMap w, x;  // [k / 64][rows][64]
  void* y;
  const void* residual;
  const float* squares;
  ScaledRows next;
  float eps;
  int m, n_out, k, up, row_tiles;  // up: rows from a gate's to its up; 0: no SwiGLU
  int resident, slots, tail;       // steps of w that have a place of their own
};

// Blocks: P parts of k, then tiles of rows, then of tokens.
template <int kTiles, int N, int P, bool kSwiglu>
__global__ void __launch_bounds__(n_thread, 2) wide_kernel(const __grid_constant__ WideParams a) {
#if defined(MM_SM90A)
  using namespace hopper;
  constexpr int copy_warp = 8, n_finish = 256;     // threads that write the output
  constexpr bool kAdds = kTiles == 1 && !kSwiglu;  // the residual; and is followed by a norm
  constexpr int x_k = slot_k(kTiles, kSwiglu), x_slot = slot_bytes(kTiles, kSwiglu, N), groups = N / 8,
                halves = x_k / 64;
  constexpr int out_rows = rows_out(kTiles, kSwiglu),
                padded = rows_staged(kTiles, kSwiglu) + 4;  // floats: no bank conflicts
  constexpr bool mixed = kSwiglu && kTiles == 1;            // a tile of 32 rows of the gate and 32 of `up`
  static_assert(P == 1 || kTiles == 1);
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char *const w_at = memory, *const x_at = memory + a.resident * kTiles * w_tile,
                       *const tail = memory + a.tail;
  uint64_t *const w_full = reinterpret_cast<uint64_t*>(tail), *const x_full = w_full + max_steps,
                  *const x_empty = x_full + max_slots, *const sent_full = x_empty + max_slots;
  float* const factor = reinterpret_cast<float*>(tail + barrier_bytes);
  unsigned char* const sent = tail + barrier_bytes + factor_bytes;
  const int thread = static_cast<int>(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x) % P, tile = static_cast<int>(blockIdx.x) / P;
  const int row0 = tile % a.row_tiles * out_rows, first_token = tile / a.row_tiles * N;
  const int tokens = min(N, a.m - first_token);
  const int all_steps = (a.k + block_k - 1) / block_k, begin = all_steps * part / P,
            steps = all_steps * (part + 1) / P - begin, x_steps = steps * (block_k / x_k);
  const int late = max(steps - a.resident, 0), freed = max(x_steps - a.slots, late * (block_k / x_k));
  // This block's share of the output: groups of 8 tokens, in items of 4 neighbouring rows.
  constexpr int per_token = out_rows / 4, chunks = (groups_of(N, P) * 8 * per_token + n_finish - 1) / n_finish;
  const int group0 = groups * part / P, share = groups * (part + 1) / P - group0, token0 = group0 * 8;
  const auto load_weights = [&](int i, int place) {
    mbarrier_arrive_expect(&w_full[i], kTiles * w_tile);
    if constexpr (mixed) {
#pragma unroll
      for (int t = 0; t < 4; t++)
        tma_load_3d(w_at + place * w_tile + t * (w_tile / 4), &a.w, &w_full[i], 0, row0 + t % 2 * a.up,
                    (begin + i) * 2 + t / 2);
    } else {
#pragma unroll
      for (int t = 0; t < kTiles; t++)
        tma_load_3d(w_at + (place * kTiles + t) * w_tile, &a.w, &w_full[i], 0, row0 + t * (kSwiglu ? a.up : tile_rows),
                    (begin + i) * 2);
    }
  };
  if (warp == copy_warp) {
    if (elect_one()) {
      for (int i = 0; i < steps; i++) mbarrier_init(&w_full[i], 1);
      for (int i = 0; i < a.slots; i++) mbarrier_init(&x_full[i], 1), mbarrier_init(&x_empty[i], 4);
      if constexpr (P > 1) {
        mbarrier_init(sent_full, 1);
        mbarrier_arrive_expect(sent_full, (P - 1) * share * 128 * 16);
      }
      mbarrier_init_fence();
      for (int i = 0; i < steps - late; i++) load_weights(i, i);
      prefetch_tensor_map(&a.x);
    }
    __syncwarp();
  }
  __syncthreads();
  let_next_begin();
  if constexpr (P > 1) cluster_arrive();
  const int items = max(min(share * 8, tokens - token0), 0) * per_token;
  const auto is_item = [&](int i) { return i < items && row0 + i % per_token * 4 < a.n_out; };
  const auto item_at = [&](int i) {
    return static_cast<int64_t>(first_token + token0 + i / per_token) * a.n_out + row0 + i % per_token * 4;
  };
  uint2 next_norm = {};  // of an item's rows
  if constexpr (kAdds) {
    if (const int row = row0 + thread % per_token * 4; a.next.norm != nullptr && warp < copy_warp && row < a.n_out)
      next_norm = __ldg(reinterpret_cast<const uint2*>(static_cast<const bf16*>(a.next.norm) + row));
  }
  wait_for_previous();

  uint2 add[chunks] = {};
  if constexpr (kAdds) {
    if (a.residual != nullptr && warp < copy_warp) {
#pragma unroll
      for (int c = 0; c < chunks; c++) {
        const int i = thread + c * n_finish;
        if (is_item(i)) add[c] = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(a.residual) + item_at(i));
      }
    }
  }

  float d[kTiles][N / 2];
  if (warp == copy_warp) {
    if (elect_one()) {
      for (int i = 0, slot = 0, phase = 0; i < a.slots + freed; i++) {
        if (i >= a.slots) mbarrier_wait(&x_empty[slot], phase ^ 1);
        if (i < x_steps) {
          mbarrier_arrive_expect(&x_full[slot], x_slot);
          tma_load_3d(x_at + slot * x_slot, &a.x, &x_full[slot], 0, first_token, begin * 2 + i * halves);
        }
        // All of a step's x have been multiplied, so its weights are not wanted any more.
        const int done = i - a.slots + 1, place = done / (block_k / x_k) - 1;
        if (done > 0 && done % (block_k / x_k) == 0 && place < late) load_weights(a.resident + place, place);
        if (++slot == a.slots) slot = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else if (warp >= 4) {
    if (const int t = thread - 128; a.squares != nullptr && t < N) {
      constexpr int together = 16;  // loads under way
      float sum = 0.0f;
      for (int first = 0; first < a.k / 64; first += together) {
        float s[together];
#pragma unroll
        for (int i = 0; i < together; i++)
          s[i] = t < tokens && first + i < a.k / 64 ? a.squares[(first + i) * a.m + first_token + t] : 0.0f;
#pragma unroll
        for (int i = 0; i < together; i++) sum += s[i];
      }
      factor[t] = rsqrtf(sum / static_cast<float>(a.k) + a.eps);
    }
  } else {
    const uint64_t w_desc = wgmma_descriptor<128>(smem_address(w_at), 0, 1024),
                   x_desc = wgmma_descriptor<128>(smem_address(x_at), 0, 1024);
    for (int i = 0, slot = 0, phase = 0; i < x_steps; i++) {
      const int w_step = i * x_k / block_k, w_half = i * x_k % block_k / 64;
      const int w_place = w_step < a.resident ? w_step : w_step - a.resident;
      if (w_half == 0) mbarrier_wait(&w_full[w_step], 0);
      mbarrier_wait(&x_full[slot], phase);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
#pragma unroll
        for (int j = 0; j < x_k / 16; j++)
          wgmma_ss<__nv_bfloat16, N>(
              d[t], w_desc + (w_place * kTiles + t) * (w_tile / 16) + (w_half + j / 4) * (w_tile / 32) + 2 * (j % 4),
              x_desc + slot * (x_slot / 16) + j / 4 * (N * 8) + 2 * (j % 4), i > 0 || j > 0);
      }
      wgmma_commit();
      if (i > 0 && i <= freed) {  // the slot before this one is wanted again, or its weights' place
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(&x_empty[slot == 0 ? a.slots - 1 : slot - 1]);
      }
      if (++slot == a.slots) slot = 0, phase ^= 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < kTiles; t++) wgmma_pin(d[t]);
  }
  __syncthreads();  // w and x have been read, factors are known

  const auto silu = [](float z) { return __fdividef(z, 1.0f + __expf(-z)); };
  // d[t][i]: row 16 warp + lane / 4 + 8 (i / 2 % 2) of tile t, token 8 (i / 4) + 2 (lane % 4) + i % 2.
  float* const sums = reinterpret_cast<float*>(memory);  // [token][padded]
  if constexpr (P > 1) {
    cluster_wait();  // the others have begun
    const auto at = [&](int from, int group) { return sent + ((from * groups_of(N, P) + group) * 128 + thread) * 16; };
    if (warp < 4) {
#pragma unroll
      for (int g = 0; g < groups; g++) {
        int to = 0;
        while (groups * (to + 1) / P <= g) to++;
        if (to != part)
          cluster_send(smem_address(at(part < to ? part : part - 1, g - groups * to / P)), smem_address(sent_full), to,
                       make_float4(d[0][4 * g], d[0][4 * g + 1], d[0][4 * g + 2], d[0][4 * g + 3]));
      }
    }
    if (warp < 4) {
      mbarrier_wait(sent_full, 0);
#pragma unroll
      for (int g = 0; g < groups; g++) {
        if (g < group0 || g >= group0 + share) continue;
        float4 sum = {};
#pragma unroll
        for (int q = 0; q < P; q++) {
          float4 v = make_float4(d[0][4 * g], d[0][4 * g + 1], d[0][4 * g + 2], d[0][4 * g + 3]);
          if (q != part) v = *reinterpret_cast<const float4*>(at(q < part ? q : q - 1, g - group0));
          sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
        float* const to = sums + ((g - group0) * 8 + 2 * (lane % 4)) * padded + warp * 16 + lane / 4;
        to[0] = sum.x, to[padded] = sum.y, to[8] = sum.z, to[padded + 8] = sum.w;
      }
    }
  } else if (warp < 4) {
#pragma unroll
    for (int g = 0; g < groups; g++) {
      const int token = 8 * g + 2 * (lane % 4);
      const float2 r =
          a.squares != nullptr ? *reinterpret_cast<const float2*>(factor + token) : make_float2(1.0f, 1.0f);
#pragma unroll
      for (int t = 0; t < rows_staged(kTiles, kSwiglu) / tile_rows; t++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float f = e % 2 == 0 ? r.x : r.y;
          float v = d[t][4 * g + e] * f;
          if constexpr (kSwiglu && !mixed) v = silu(v) * (d[kTiles - 1][4 * g + e] * f);
          sums[(token + e % 2) * padded + t * tile_rows + warp * 16 + lane / 4 + e / 2 * 8] = v;
        }
      }
    }
  }
  __syncthreads();
  if (warp == copy_warp) return;
#pragma unroll
  for (int c = 0; c < chunks; c++) {
    const int i = thread + c * n_finish;
    const bool there = is_item(i);
    uint2 y = {};
    if (there) {
      const float* from = sums + i / per_token * padded + i % per_token * 4;
      float4 out = *reinterpret_cast<const float4*>(from);
      if constexpr (mixed) {
        const float4 by = *reinterpret_cast<const float4*>(from + tile_rows / 2);
        out = make_float4(silu(out.x) * by.x, silu(out.y) * by.y, silu(out.z) * by.z, silu(out.w) * by.w);
      }
      if constexpr (kAdds) {
        if (a.residual != nullptr) {
          const float2 lo = unpack2<bf16>(add[c].x), hi = unpack2<bf16>(add[c].y);
          out = make_float4(out.x + lo.x, out.y + lo.y, out.z + hi.x, out.w + hi.y);
        }
      }
      y = make_uint2(pack2<bf16>(out.x, out.y), pack2<bf16>(out.z, out.w));
      *reinterpret_cast<uint2*>(static_cast<bf16*>(a.y) + item_at(i)) = y;
    }
    if constexpr (kAdds) {
      if (a.next.norm != nullptr) {
        if (there)
          *reinterpret_cast<uint2*>(static_cast<bf16*>(a.next.scaled) + item_at(i)) =
              make_uint2(multiply2(y.x, next_norm.x), multiply2(y.y, next_norm.y));
        // 16 lanes hold the tile's 64 rows of a token.
        const float2 lo = unpack2<bf16>(y.x), hi = unpack2<bf16>(y.y);
        const float s = warp_sum<16>(lo.x * lo.x + lo.y * lo.y + hi.x * hi.x + hi.y * hi.y);
        if (lane % 16 == 0 && i < items) a.next.squares[row0 / 64 * a.m + first_token + token0 + i / per_token] = s;
      }
    }
  }
#endif
}

// [rows, k] bf16 as [k / 64][rows][64], in boxes of `deep` x box_rows x 64.
CUtensorMap rows_map(const void* p, int64_t rows, int64_t k, int box_rows, int deep) {
  const cuuint64_t size[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(k / 64)},
                   bytes[2] = {static_cast<cuuint64_t>(2 * k), 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(deep)}, step[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult r = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), size, bytes, box,
                                    step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled", "refused", __FILE__, __LINE__);
  return map;
}

int64_t rows_of(const FewLinear& a) { return a.swiglu ? a.n / 2 : a.n; }
int64_t blocks_of(const FewLinear& a, const Spread& s) {
  return div_up(rows_of(a), rows_out(s.tiles, a.swiglu)) * div_up(a.m, s.columns) * s.parts;
}

// Completes a spread of which tiles, columns, parts and, if not 0, slots are given; false: it does not fit one wave.
bool complete(const Context& ctx, const FewLinear& a, Spread& s) {
  if ((s.tiles == 2 || a.swiglu) && (a.residual != nullptr || a.next.norm != nullptr || s.parts > 1 || s.columns == 16))
    return false;
  if (s.columns == 16 && s.parts > 2) return false;
  if (s.parts > 1 && a.squares != nullptr) return false;
  const int64_t all = div_up(a.k, block_k);
  if (all < s.parts || div_up(all, s.parts) > max_steps) return false;
  s.steps = static_cast<int>(div_up(all, s.parts));
  if (s.late > 0 && s.steps - s.late < std::max(2, s.late)) return false;  // their places are free in time
  const int slot = slot_bytes(s.tiles, a.swiglu, s.columns);
  const int fixed = barrier_bytes + factor_bytes + sent_bytes(s.columns, s.parts),
            w = (s.steps - s.late) * s.tiles * w_tile, wanted = s.steps * (block_k / slot_k(s.tiles, a.swiglu));
  const int room = std::min((max_shared - fixed - w) / slot, max_slots);
  s.slots = std::min(s.slots == 0 ? wanted : std::min(s.slots, wanted), room);
  if (s.slots < std::min(wanted, 2)) return false;
  s.tail = std::max(w + s.slots * slot, s.columns * (rows_staged(s.tiles, a.swiglu) + 4) * 4);
  s.shared = s.tail + fixed;
  return s.shared <= max_shared && blocks_of(a, s) <= (s.shared <= two_blocks ? 2 : 1) * int64_t{ctx.n_sm};
}

// What x costs that does not fit beside w: a slot used again, or weights that come late, in clocks.
double clocks_again(const FewLinear& a, const Spread& s) {
  const int x_steps = s.steps * (block_k / slot_k(s.tiles, a.swiglu));
  return 1000.0 * (x_steps - s.slots) / s.slots + 150.0 * s.late;
}

// Measured inside steps of the 64M model. Blocks of this kernel and the next, which take an SM each, should fit the GPU
// together, or the next one's weights come late: `down` for 96 tokens in 2 parts of 48 columns (48 blocks) instead of 4
// (96 blocks) 1.1 us a launch. So: 32 columns where that is few blocks; else as few tiles of tokens as there can be,
// one tile of rows if that is one block an SM, else two; k in as few parts as fit.
Spread spread_of(const Context& ctx, const FewLinear& a) {
  Spread best;
  const auto consider = [&](int columns, int tiles, int parts, int64_t most_blocks) {
    for (int late = 0; late <= 2; late++) {
      Spread s = {.tiles = tiles, .columns = columns, .parts = parts, .late = late};
      if (!complete(ctx, a, s) || blocks_of(a, s) > most_blocks) continue;
      if (best.columns == 0 || clocks_again(a, s) < clocks_again(a, best)) best = s;
    }
    return best.columns != 0;
  };
  if (consider(32, 1, 1, ctx.n_sm * 3 / 4) || consider(32, 1, 2, ctx.n_sm / 2)) return best;
  const int fewest = div_up(a.m, div_up(a.m, 64)) <= 48 ? 48 : 64;
  for (const int an_sm : {1, 2}) {
    for (const int columns : {fewest, 64, 48, 32}) {
      for (int tiles = 1; tiles <= 2; tiles++) {
        for (int parts = 1; parts <= max_parts; parts++) {
          if (consider(columns, tiles, parts, int64_t{an_sm} * ctx.n_sm)) return best;
        }
      }
    }
  }
  return best;
}

template <int kTiles, int N, int P, bool kSwiglu>
void launch_wide(const Context& ctx, const WideParams& p, const Spread& s, int64_t blocks) {
  const auto kernel = wide_kernel<kTiles, N, P, kSwiglu>;
  static const cudaError_t once = [&] {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    return e != cudaSuccess ? e : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
  }();
  MM_CUDA_CHECK(once);
  launch_overlapped(ctx, kernel, dim3(static_cast<unsigned>(blocks)), n_thread, static_cast<size_t>(s.shared), P, p);
}

void launch_spread(const Context& ctx, const FewLinear& a, const Spread& s) {
  const int64_t n_out = rows_of(a);
  const bool mixed = a.swiglu && s.tiles == 1;
  const WideParams p = {rows_map(a.w, a.n, a.k, mixed ? tile_rows / 2 : tile_rows, mixed ? 1 : 2),
                        rows_map(a.x, a.m, a.k, s.columns, slot_k(s.tiles, a.swiglu) / 64),
                        a.y,
                        a.residual,
                        a.squares,
                        a.next,
                        a.eps,
                        static_cast<int>(a.m),
                        static_cast<int>(n_out),
                        static_cast<int>(a.k),
                        a.swiglu ? static_cast<int>(n_out) : 0,
                        static_cast<int>(div_up(n_out, rows_out(s.tiles, a.swiglu))),
                        s.steps - s.late,
                        s.slots,
                        s.tail};
  const int64_t blocks = blocks_of(a, s);
  const auto with = [&]<int N>(std::integral_constant<int, N>) {
    if (mixed) return launch_wide<1, N, 1, true>(ctx, p, s, blocks);
    if (a.swiglu) return launch_wide<2, N, 1, true>(ctx, p, s, blocks);
    if (s.tiles == 2) return launch_wide<2, N, 1, false>(ctx, p, s, blocks);
    switch (s.parts) {
      case 1: return launch_wide<1, N, 1, false>(ctx, p, s, blocks);
      case 2: return launch_wide<1, N, 2, false>(ctx, p, s, blocks);
      case 3: return launch_wide<1, N, 3, false>(ctx, p, s, blocks);
      default: return launch_wide<1, N, 4, false>(ctx, p, s, blocks);
    }
  };
  if (s.columns == 16) {
    if (s.parts == 1) return launch_wide<1, 16, 1, false>(ctx, p, s, blocks);
    return launch_wide<1, 16, 2, false>(ctx, p, s, blocks);
  }
  if (s.columns == 32) with(std::integral_constant<int, 32>{});
  else if (s.columns == 48) with(std::integral_constant<int, 48>{});
  else with(std::integral_constant<int, 64>{});
}

}  // namespace

bool linear_wide_fits(const Context& ctx, DType t, const FewLinear& a) {
  if (ctx.arch != 90 || t != DType::bf16 || a.scales != nullptr || a.norm != nullptr || a.m < 1 || a.m > max_tokens)
    return false;
  if ((a.swiglu ? a.n / 2 : a.n) % 4 != 0 || a.k % 64 != 0 || a.n >= (int64_t{1} << 20) || a.k >= (int64_t{1} << 20))
    return false;
  return aligned({a.x, a.w, a.y, a.residual, a.next.norm, a.next.scaled}) && spread_of(ctx, a).columns != 0;
}

void linear_wide(const Context& ctx, DType t, const FewLinear& a) {
  if (a.m == 0 || a.n == 0) return;
  if (!linear_wide_fits(ctx, t, a)) fail("linear_wide", "what it does not take", __FILE__, __LINE__);
  launch_spread(ctx, a, spread_of(ctx, a));
}

}  // namespace mm::cuda
