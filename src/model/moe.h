// The mixture-of-experts FFN of one layer. No token is dropped; experts without tokens cost nothing.
//
//   scores = softmax(router(h)), the top_k best experts, weights = their scores (over their sum when norm_topk_prob)
//   y = sum_j weight_j expert_j(h) (+ shared experts);  aux = coef * E * sum_e load_e * mean_t(scores[t,e]),
//   load_e = chosen pairs of expert e / tokens (MiniMind's MOEFeedForward; gradient through the mean score only)
#pragma once

#include "model/activations.h"
#include "model/params.h"
#include "tensor/device.h"

namespace mm {

// x = residual + ffn(a.h_mid); acts.aux += the staged share of the balance loss. x may be residual.
void moe_forward(const Device& dev, const ModelConfig& config, const LayerViews& w, LayerActs& a, Activations& acts,
                 View x, View residual);

// dx = acts.dres is the gradient of the layer's output; writes acts.dh = d(h), adds to g. a.h_mid holds h.
void moe_backward(const Device& dev, const ModelConfig& config, const LayerViews& w, LayerViews& g, LayerActs& a,
                  Activations& acts);

}  // namespace mm
