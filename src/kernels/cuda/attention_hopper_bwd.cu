// Attention, backward, on Hopper's tensor cores (wgmma). With c = scale log2(e), P = exp2(c S - log2(e) lse) and
// delta = rowsum(dout * out):
//   S = Q K^T, dP = dO V^T, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
// Two kernels, each a forward pass in shape, so that nothing is added up in memory and the order of every sum is fixed:
//   dq:   an item is 128 query rows of one head (two warpgroups of 64), walks over the key tiles; also writes delta;
//   dkdv: an item is 128 keys of one kv head, walks over the query tiles at and after them of all heads of the group;
//         it computes S^T and dP^T (rows: keys), so that P^T and dS^T are A operands straight from the accumulators.
// S and dP are computed twice: 14 d flops a visible pair instead of the 10 d of one fused kernel, which in return would
// need dQ added up in fp32 through L2 in a fixed order and dS transposed through shared memory.
//
// In both, one block a processor takes items (tile, head) from a counter until none is left; warps 0-7 compute, warp 8
// feeds them through TMA, already the next item while they are at the last (its warpgroup gives its registers to them):
//
//   dq:   [ q, do: 128 rows ] stays      out, then k, v of 64 keys: ring      dq [64, d] a warpgroup in registers
//   dkdv: [ k, v: 128 rows ]  stays      q, do, lse, delta of 64 rows: ring   dk, dv [64, d] a warpgroup in registers
//
// Measured (H100, bf16, causal; us of dq and dkdv alone; of both, with TFLOP/s at 10 d a visible pair; 3% between
// runs): B32 T768 H8/4 D96 114, 141; 250, 291. B64 T512 H8/2 D64 90, 118; 203, 213. B16 T2048 H8/4 D96 273, 405; 651,
// 396. B16 T2048 H8/2 D64 233, 387; 614, 280. B16 T1024 H16/8 D128 215, 291; 501, 343. 24576 tokens of
// sequences 20..600 H8/4 D96 98, 97; 187, 201. The tensor cores do up to 566 TFLOP/s (dq). With the last 400 /
// n_kv_head tiles of the list sorted by row B32 T768 takes 225 us, B64 T512 176, B16 T2048 D64 527: the last items then
// are short ones. Lost: one block an item (11% slower at B64 T512), 128 keys a stage in dq (same), fewer than four
// stages in dq (12%), S of the next tile also before the exponentials in dkdv (ptxas runs out of registers and
// serialises the products).
#include <algorithm>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_hopper_dkdv.cuh"
#include "kernels/cuda/attention_hopper_dq.cuh"

namespace mm::cuda {
namespace hopper {
namespace {

constexpr size_t kCounterBytes = 256;  // of the scratch; delta follows

BwdParams params_of(const Context& ctx, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  BwdParams p;
  p.lse = a.lse, p.counters = static_cast<int*>(ctx.scratch);
  p.delta = reinterpret_cast<float*>(static_cast<uint8_t*>(ctx.scratch) + kCounterBytes);
  p.dq = b.dq, p.dk = b.dk, p.dv = b.dv;
  p.cu = a.cu, p.tiles = a.tiles, p.n_tiles = a.n_tiles;
  p.lddq = b.lddq, p.lddk = b.lddk, p.lddv = b.lddv;
  p.n_head = a.n_head, p.n_kv_head = a.n_kv_head, p.group = a.n_head / a.n_kv_head;
  p.scale = a.scale;
  return p;
}

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

unsigned blocks(const Context& ctx, int64_t items) { return static_cast<unsigned>(std::min<int64_t>(ctx.n_sm, items)); }

void reset_counters(const Context& ctx) { MM_CUDA_CHECK(cudaMemsetAsync(ctx.scratch, 0, 2 * sizeof(int), ctx.stream)); }

template <class T, int D, int kStages, int kBuffers>
void launch_dq(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  constexpr int kBytes = DqShared<D, kStages, kBuffers>::kBytes;
  const auto kernel = attention_dq_kernel<T, D, kStages, kBuffers>;
  static const bool once = (allow_shared(kernel, kBytes), true);
  (void)once;
  kernel<<<blocks(ctx, a.max_tiles * a.n_head), kBwdThreads, kBytes, ctx.stream>>>(
      tile_map<D>(t, a.q, a.ldq, a.n_tok, a.n_head, kRows), tile_map<D>(t, b.dout, b.lddout, a.n_tok, a.n_head, kRows),
      tile_map<D>(t, a.out, a.ldo, a.n_tok, a.n_head, kKeys), tile_map<D>(t, a.k, a.ldk, a.n_tok, a.n_kv_head, kKeys),
      tile_map<D>(t, a.v, a.ldv, a.n_tok, a.n_kv_head, kKeys), params_of(ctx, b));
  MM_CUDA_LAUNCHED();
}

template <class T, int D, int kStages>
void launch_dkdv(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  constexpr int kBytes = DkdvShared<D, kStages>::kBytes;
  const auto kernel = attention_dkdv_kernel<T, D, kStages>;
  static const bool once = (allow_shared(kernel, kBytes), true);
  (void)once;
  kernel<<<blocks(ctx, a.max_tiles * a.n_kv_head), kBwdThreads, kBytes, ctx.stream>>>(
      tile_map<D>(t, a.q, a.ldq, a.n_tok, a.n_head, kQueries),
      tile_map<D>(t, b.dout, b.lddout, a.n_tok, a.n_head, kQueries),
      tile_map<D>(t, a.k, a.ldk, a.n_tok, a.n_kv_head, kRows), tile_map<D>(t, a.v, a.ldv, a.n_tok, a.n_kv_head, kRows),
      params_of(ctx, b));
  MM_CUDA_LAUNCHED();
}

template <int D>
void launch(const Context& ctx, DType t, const AttentionBwd& b) {
  reset_counters(ctx);
  constexpr int kDqStages = D <= 64 ? 6 : D <= 96 ? 4 : 5, kBuffers = D <= 96 ? 2 : 1, kStages = D <= 96 ? 4 : 3;
  launch_dq<bf16, D, kDqStages, kBuffers>(ctx, t, b);
  launch_dkdv<bf16, D, kStages>(ctx, t, b);
}

}  // namespace
}  // namespace hopper

bool hopper_attention_bwd_supported(const Context& ctx, DType t, const AttentionBwd& b) {
  return hopper_attention_supported(ctx, t, b.fwd) && b.fwd.lse != nullptr && hopper::tma_readable(b.dout, b.lddout) &&
         hopper::tma_readable(b.dq, b.lddq) && hopper::tma_readable(b.dk, b.lddk) &&
         hopper::tma_readable(b.dv, b.lddv) &&
         ctx.scratch_bytes >= hopper_attention_bwd_scratch(t, b.fwd.n_tok, b.fwd.n_head, b.fwd.n_kv_head, b.fwd.d_head);
}

size_t hopper_attention_bwd_scratch(DType t, int64_t n_tok, int n_head, int, int) {
  return t == DType::bf16
             ? hopper::kCounterBytes + sizeof(float) * static_cast<size_t>(n_tok) * static_cast<size_t>(n_head)
             : 0;
}

void hopper_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  if (b.fwd.n_tok == 0 || b.fwd.max_tiles == 0) return;
  switch (b.fwd.d_head) {
    case 32: return hopper::launch<32>(ctx, t, b);
    case 64: return hopper::launch<64>(ctx, t, b);
    case 96: return hopper::launch<96>(ctx, t, b);
    default: return hopper::launch<128>(ctx, t, b);
  }
}

}  // namespace mm::cuda
