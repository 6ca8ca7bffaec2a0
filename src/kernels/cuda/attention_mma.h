// The paths of attention that run on every device; attention.cu chooses.
#pragma once

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

// bf16 and f16, d_head 32, 64, 96, 128, no dropout, rows aligned to 16 bytes. Sequences of fewer queries than
// `least_queries` are left out.
void mma_attention_fwd(const Context& ctx, DType t, const Attention& a, int least_queries = 1);
void mma_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b);
size_t mma_attention_bwd_scratch(int64_t n_tok, int n_head);

// Any type, d_head up to 256, dropout, any alignment.
void general_attention_fwd(const Context& ctx, DType t, const Attention& a);
void general_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b);
size_t general_attention_bwd_scratch(int64_t n_tok, int n_head);

// Few queries a sequence against many keys. Any type, d_head 32, 64, 96, 128, no dropout, rows aligned to 16 bytes.
// singles_only: only the sequences of one query.
void decode_attention_fwd(const Context& ctx, DType t, const Attention& a, bool singles_only = false);

// Scores in memory: what the fused kernels are compared with. bf16 and f16 as mma_attention_fwd, forward only; the
// longest sequence must be known on the host and its scores fit ctx.scratch.
bool naive_attention_supported(const Context& ctx, const Attention& a);
void naive_attention_fwd(const Context& ctx, DType t, const Attention& a);

}  // namespace mm::cuda
