// The reference device: the specification run in float.
#include "kernels/ref/ref_attention.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

const KernelTable& ref_kernels() {
  static const KernelTable table = {
      .linear_fwd = ref::linear_fwd<float>,
      .linear_bwd = ref::linear_bwd<float>,
      .embed_fwd = ref::embed_fwd<float>,
      .embed_bwd = ref::embed_bwd<float>,
      .rmsnorm_fwd = ref::rmsnorm_fwd<float>,
      .rmsnorm_bwd = ref::rmsnorm_bwd<float>,
      .qk_norm_rope_fwd =
          [](float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots, const float* qkv,
             const NormRopeArgs& a) {
            ref::qk_norm_rope_fwd(q_out, k_out, ldk, v_out, ldv, slots, qkv, a.q_weight, a.k_weight, a);
          },
      .qk_norm_rope_bwd =
          [](float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a) {
            ref::qk_norm_rope_bwd(dqkv, dq_weight, dk_weight, qkv, a.q_weight, a.k_weight, a);
          },
      .attention_fwd = [](const AttentionArgs& a) { ref::attention_fwd(a, a.q, a.k, a.v, a.out, a.lse); },
      .attention_bwd =
          [](const AttentionBwdArgs& b) {
            const AttentionArgs& a = b.fwd;
            for (int64_t t = a.cu[0]; t < a.cu[a.n_seq]; t++) {
              std::fill_n(b.dq + t * b.lddq, a.n_head * a.d_head, 0.0f);
              std::fill_n(b.dk + t * b.lddk, a.n_kv_head * a.d_head, 0.0f);
              std::fill_n(b.dv + t * b.lddv, a.n_kv_head * a.d_head, 0.0f);
            }
            ref::attention_bwd(b, a.q, a.k, a.v, b.dout, b.dq, b.dk, b.dv);
          },
      .swiglu_fwd = ref::swiglu_fwd<float>,
      .swiglu_bwd = ref::swiglu_bwd<float>,
      .logprob_fwd = ref::logprob_fwd<float>,
      .logprob_bwd = ref::logprob_bwd<float>,
      .dropout = ref::dropout<float>,
      .add = ref::add<float>,
      .moe_route_fwd = ref::moe_route_fwd<float>,
      .moe_route_bwd = ref::moe_route_bwd<float>,
      .gather_rows = ref::gather_rows<float>,
      .scatter_rows = ref::scatter_rows<float>,
      .moe_combine_fwd = ref::moe_combine_fwd<float>,
      .moe_combine_bwd = ref::moe_combine_bwd<float>,
      .scatter_add = ref::scatter_add<float>,
      .adamw = ref::adamw<float>,
      .copy = [](float* y, const float* x, int64_t n) { std::copy_n(x, n, y); },
      .zero = [](float* x, int64_t n) { std::fill_n(x, n, 0.0f); },
      .sum_sq = ref::sum_sq<float>,
  };
  return table;
}

}  // namespace mm
