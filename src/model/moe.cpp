#include "model/moe.h"

#include "kernels/ops.h"

namespace mm {

void moe_forward(const Device& dev, const ModelConfig& c, const LayerViews& w, LayerActs& a, Activations& acts, View x,
                 View residual) {
  const int64_t stride = ParamBuffer::expert_stride(c);
  ops::linear_fwd(dev, acts.router_logits, a.h_mid, w.router);
  ops::moe_route_fwd(dev, a.scores, a.experts.as<int32_t>(), a.weights, acts.router_logits, c.norm_topk_prob);
  ops::moe_sort(dev, a.slot, a.rows, a.offset, a.experts);
  if (acts.stage.current().share != nullptr)  // not where text is generated
    ops::moe_balance(dev, acts.aux, View(), acts.stage.current().share, a.scores, a.offset,
                     static_cast<double>(c.router_aux_loss_coef));
  ops::gather_rows(dev, acts.gathered, a.h_mid, a.rows.as<int32_t>());
  ops::grouped_fwd(dev, a.gate_up, acts.gathered, w.expert_gate_up[0], stride, a.offset);
  ops::swiglu_fwd(dev, a.act, a.gate_up);
  ops::grouped_fwd(dev, a.expert_out, a.act, w.expert_down[0], stride, a.offset);
  if (x.data != residual.data) ops::copy(dev, x, residual);
  ops::moe_combine_fwd(dev, x, a.expert_out, a.slot.as<int32_t>(), a.weights);
  const View act = a.act.row_slice(0, x.rows());
  for (size_t e = 0; e < w.shared_down.size(); e++) {
    ops::linear_fwd(dev, a.shared_gate_up[e], a.h_mid, w.shared_gate_up[e]);
    ops::swiglu_fwd(dev, act, a.shared_gate_up[e]);
    ops::linear_fwd(dev, x, act, w.shared_down[e], x);
  }
}

void moe_backward(const Device& dev, const ModelConfig& c, const LayerViews& w, LayerViews& g, LayerActs& a,
                  Activations& acts) {
  const int64_t stride = ParamBuffer::expert_stride(c);
  ops::moe_combine_bwd(dev, acts.dexpert, acts.dweights, acts.dres, a.expert_out, a.slot.as<int32_t>(), a.weights);
  ops::gather_rows(dev, acts.gathered, a.h_mid, a.rows.as<int32_t>());
  if (acts.recompute() == Recompute::ffn)
    ops::grouped_fwd(dev, a.gate_up, acts.gathered, w.expert_gate_up[0], stride, a.offset);
  ops::grouped_bwd(dev, acts.dact, View(), acts.dexpert, View(), w.expert_down[0], stride, a.offset);
  ops::swiglu_bwd(dev, a.gate_up, a.act, acts.dact, a.gate_up);  // gate_up becomes its gradient
  ops::grouped_bwd(dev, View(), g.expert_down[0], acts.dexpert, a.act, w.expert_down[0], stride, a.offset);
  ops::grouped_bwd(dev, acts.dexpert, g.expert_gate_up[0], a.gate_up, acts.gathered, w.expert_gate_up[0], stride,
                   a.offset);
  ops::scatter_add(dev, acts.dh, acts.dexpert, a.slot.as<int32_t>(), static_cast<int>(a.weights.cols()));
  const View act = a.act.row_slice(0, acts.dres.rows()), dact = acts.dact.row_slice(0, acts.dres.rows());
  for (size_t e = 0; e < w.shared_down.size(); e++) {
    ops::linear_swiglu_bwd(dev, a.shared_gate_up[e], act, dact, acts.dres, w.shared_down[e], a.shared_gate_up[e]);
    ops::linear_bwd(dev, View(), g.shared_down[e], acts.dres, act, w.shared_down[e]);
    ops::linear_bwd(dev, acts.dh, g.shared_gate_up[e], a.shared_gate_up[e], a.h_mid, w.shared_gate_up[e], true);
  }
  ops::moe_balance(dev, View(), acts.daux, acts.stage.current().share, a.scores, a.offset,
                   static_cast<double>(c.router_aux_loss_coef));
  ops::moe_route_bwd(dev, acts.router_logits, acts.dweights, acts.daux, a.scores, a.experts.as<int32_t>(),
                     c.norm_topk_prob);
  ops::linear_bwd(dev, acts.dh, g.router, acts.router_logits, a.h_mid, w.router, true);
}

}  // namespace mm
