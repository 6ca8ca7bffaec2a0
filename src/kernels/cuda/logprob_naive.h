// Cross-entropy as one kernel for each step, the way an eager framework runs it: what the fused kernel of logprob.cu is
// compared with (ctx.naive_ce).
#pragma once

#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

// dlogits (null: forward only) may be logits.
void naive_logprob(const Context& ctx, DType t, void* dlogits, float* logp, float* lse, const void* logits,
                   const float* g, const int32_t* targets, int64_t n, int64_t v);
void naive_logprob_bwd(const Context& ctx, DType t, void* logits, const float* lse, const float* g,
                       const int32_t* targets, int64_t n, int64_t v);

}  // namespace mm::cuda
