// Which attention runs:
//
//   fp32, dropout, odd widths or rows that are not 16-byte aligned   -> attention_general.cu
//   naive_attention asked for (forward, lengths known)               -> attention_naive.cu
//   few queries a sequence against a cache of keys                   -> attention_decode.cu (mixed: those sequences
//   only) sm_90, where it supports the shape                               -> attention_hopper_*.cu else ->
//   attention_mma_fwd.cu, attention_mma_bwd.cu
#include <algorithm>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {

namespace {

bool supported_width(int d) { return d == 32 || d == 64 || d == 96 || d == 128; }
bool rows_aligned(DType t, std::initializer_list<int64_t> distances) {
  const int64_t per_16 = t == DType::f32 ? 4 : 8;
  return std::all_of(distances.begin(), distances.end(), [&](int64_t ld) { return ld % per_16 == 0; });
}
// What the kernels of 16-byte copies and fixed widths need. Padding by -inf and a maximum taken before scaling: scale >
// 0.
bool plain(DType t, const Attention& a) {
  return supported_width(a.d_head) && a.dropout == 0.0f && a.scale > 0.0f && aligned({a.q, a.k, a.v, a.out}) &&
         rows_aligned(t, {a.ldq, a.ldk, a.ldv, a.ldo});
}
bool plain(DType t, const AttentionBwd& b) {
  return plain(t, b.fwd) && aligned({b.dout, b.dq, b.dk, b.dv}) && rows_aligned(t, {b.lddout, b.lddq, b.lddk, b.lddv});
}
bool for_tensor_cores(DType t) { return t == DType::bf16 || t == DType::f16; }

}  // namespace

void attention_fwd(const Context& ctx, DType t, const Attention& a) {
  if (a.n_tok == 0 || a.n_seq == 0) return;
  if (!plain(t, a)) return general_attention_fwd(ctx, t, a);
  // With one query a sequence a tile of 128 rows would hold one; with more of them, reading the keys once for all pays.
  if (a.kv_len != nullptr && a.n_tok <= a.n_seq + std::max<int64_t>(a.n_seq / 4, 7) && a.n_tok <= 65535)
    return decode_attention_fwd(ctx, t, a);
  if (!for_tensor_cores(t)) return general_attention_fwd(ctx, t, a);
  if (a.kv_len != nullptr && a.n_seq >= 8 && a.n_seq <= 65535) {  // prompts beside decode steps: each its kernel
    decode_attention_fwd(ctx, t, a, true);
    return mma_attention_fwd(ctx, t, a, 2);
  }
  if (ctx.naive_attention && naive_attention_supported(ctx, a)) return naive_attention_fwd(ctx, t, a);
  if (hopper_attention_supported(ctx, t, a)) return hopper_attention_fwd(ctx, t, a);
  mma_attention_fwd(ctx, t, a);
}

void attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  if (b.fwd.n_tok == 0 || b.fwd.n_seq == 0) return;
  if (!plain(t, b) || !for_tensor_cores(t)) return general_attention_bwd(ctx, t, b);
  if (hopper_attention_bwd_supported(ctx, t, b)) return hopper_attention_bwd(ctx, t, b);
  mma_attention_bwd(ctx, t, b);
}

size_t attention_bwd_scratch(DType t, int64_t n_tok, int n_head, int n_kv_head, int d_head) {
  return std::max({general_attention_bwd_scratch(n_tok, n_head), mma_attention_bwd_scratch(n_tok, n_head),
                   hopper_attention_bwd_scratch(t, n_tok, n_head, n_kv_head, d_head)});
}

}  // namespace mm::cuda
