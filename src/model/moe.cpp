#include "model/moe.h"

#include "kernels/ops.h"

namespace mm {

// Orders the (token, choice) pairs by expert: slot[t, j] = row of the pair, rows[row] = token, offset = first row of
// each expert.
static void sort_by_expert(LayerActs& a, int64_t n_expert) {
  const int64_t pairs = a.experts.numel(), top_k = a.experts.cols();
  const auto* expert = a.experts.as<int32_t>();
  auto *slot = a.slot.as<int32_t>(), *rows = a.rows.as<int32_t>();
  a.offset.assign(static_cast<size_t>(n_expert) + 1, 0);
  for (int64_t i = 0; i < pairs; i++) a.offset[static_cast<size_t>(expert[i]) + 1]++;
  for (size_t e = 1; e < a.offset.size(); e++) a.offset[e] += a.offset[e - 1];
  std::vector<int64_t> next(a.offset.begin(), a.offset.end() - 1);
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t row = next[static_cast<size_t>(expert[i])]++;
    slot[i] = static_cast<int32_t>(row);
    rows[row] = static_cast<int32_t>(i / top_k);
  }
}

// Gradient of coef * E * sum_e load_e mean_t(scores[t,e]) with respect to one score of expert e; also the loss itself.
static double balance_loss(const ModelConfig& c, const LayerActs& a, float* dscore) {
  const int64_t n = a.scores.rows(), n_expert = c.num_experts;
  const float* scores = a.scores.f32();
  double loss = 0;
  for (int64_t e = 0; e < n_expert; e++) {
    double mean = 0;
    for (int64_t t = 0; t < n; t++) mean += scores[t * n_expert + e];
    mean /= static_cast<double>(n);
    const double load = static_cast<double>(a.offset[static_cast<size_t>(e) + 1] - a.offset[static_cast<size_t>(e)]) /
                        static_cast<double>(n);
    const double scale = static_cast<double>(c.router_aux_loss_coef) * static_cast<double>(n_expert) * load;
    loss += scale * mean;
    if (dscore != nullptr) dscore[e] = static_cast<float>(scale / static_cast<double>(n));
  }
  return loss;
}

double moe_forward(const Device& dev, const ModelConfig& c, const LayerViews& w, LayerActs& a, Activations& acts,
                   View x) {
  ops::linear_fwd(dev, acts.router_logits, acts.h, w.router);
  ops::moe_route_fwd(dev, a.scores, a.experts.as<int32_t>(), a.weights, acts.router_logits, c.norm_topk_prob);
  sort_by_expert(a, c.num_experts);
  ops::gather_rows(dev, acts.gathered, acts.h, a.rows.as<int32_t>());
  for (size_t e = 0; e < w.expert_down.size(); e++) {
    const int64_t begin = a.offset[e], end = a.offset[e + 1];
    if (begin == end) continue;
    ops::linear_fwd(dev, a.gate_up.row_slice(begin, end), acts.gathered.row_slice(begin, end), w.expert_gate_up[e]);
    ops::swiglu_fwd(dev, acts.act.row_slice(begin, end), a.gate_up.row_slice(begin, end));
    ops::linear_fwd(dev, a.expert_out.row_slice(begin, end), acts.act.row_slice(begin, end), w.expert_down[e]);
  }
  ops::moe_combine_fwd(dev, x, a.expert_out, a.slot.as<int32_t>(), a.weights);
  const View act = acts.act.row_slice(0, x.rows());
  for (size_t e = 0; e < w.shared_down.size(); e++) {
    ops::linear_fwd(dev, a.shared_gate_up[e], acts.h, w.shared_gate_up[e]);
    ops::swiglu_fwd(dev, act, a.shared_gate_up[e]);
    ops::linear_fwd(dev, x, act, w.shared_down[e], true);
  }
  return balance_loss(c, a, nullptr);
}

void moe_backward(const Device& dev, const ModelConfig& c, const LayerViews& w, LayerViews& g, LayerActs& a,
                  Activations& acts, float aux_scale) {
  ops::moe_combine_bwd(dev, acts.dexpert, acts.dweights, acts.dres, a.expert_out, a.slot.as<int32_t>(), a.weights);
  ops::gather_rows(dev, acts.gathered, acts.h, a.rows.as<int32_t>());
  for (size_t e = 0; e < w.expert_down.size(); e++) {
    const int64_t begin = a.offset[e], end = a.offset[e + 1];
    if (begin == end) continue;
    const View gate_up = a.gate_up.row_slice(begin, end), act = acts.act.row_slice(begin, end),
               dact = acts.dact.row_slice(begin, end);
    const View dout = acts.dexpert.row_slice(begin, end);
    ops::swiglu_fwd(dev, act, gate_up);
    ops::linear_bwd(dev, dact, g.expert_down[e], dout, act, w.expert_down[e]);
    ops::swiglu_bwd(dev, gate_up, dact, gate_up);
    ops::linear_bwd(dev, dout, g.expert_gate_up[e], gate_up, acts.gathered.row_slice(begin, end), w.expert_gate_up[e]);
  }
  ops::scatter_add(dev, acts.dh, acts.dexpert, a.slot.as<int32_t>(), static_cast<int>(a.weights.cols()));
  const View act = acts.act.row_slice(0, acts.dres.rows()), dact = acts.dact.row_slice(0, acts.dres.rows());
  for (size_t e = 0; e < w.shared_down.size(); e++) {
    ops::swiglu_fwd(dev, act, a.shared_gate_up[e]);
    ops::linear_bwd(dev, dact, g.shared_down[e], acts.dres, act, w.shared_down[e]);
    ops::swiglu_bwd(dev, a.shared_gate_up[e], dact, a.shared_gate_up[e]);
    ops::linear_bwd(dev, acts.dh, g.shared_gate_up[e], a.shared_gate_up[e], acts.h, w.shared_gate_up[e], true);
  }
  float* daux = acts.daux.f32();
  balance_loss(c, a, daux);
  for (int64_t e = 0; e < c.num_experts; e++) daux[e] *= aux_scale;
  ops::moe_route_bwd(dev, acts.router_logits, acts.dweights, acts.daux, a.scores, a.experts.as<int32_t>(),
                     c.norm_topk_prob);
  ops::linear_bwd(dev, acts.dh, g.router, acts.router_logits, acts.h, w.router, true);
}

}  // namespace mm
