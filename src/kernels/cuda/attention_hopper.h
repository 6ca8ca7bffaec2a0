// The Hopper path of attention (wgmma, bulk copies). attention.cu asks `supported` first: arch, type, head width,
// layout.
#pragma once

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

bool hopper_attention_supported(const Context& ctx, DType t, const Attention& a);
void hopper_attention_fwd(const Context& ctx, DType t, const Attention& a);
bool hopper_attention_bwd_supported(const Context& ctx, DType t, const AttentionBwd& b);
void hopper_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b);
// Bytes of ctx.scratch that hopper_attention_bwd takes; 0 for what it does not support.
size_t hopper_attention_bwd_scratch(DType t, int64_t n_tok, int n_head, int n_kv_head, int d_head);

}  // namespace mm::cuda
