// Objectives supply g[t] = dL/dlogp[t] for every token; the LM head and the backward pass do the rest.
#pragma once

#include <vector>

#include "tensor/token_batch.h"

namespace mm {

// Mean cross-entropy over the weighted targets of the whole optimizer step (all its micro-batches):
//   L = -sum_t w_t logp_t / W,  g_t = -w_t / W,  W = sum of w over the step
// g does not depend on logp, so one pass of the LM head serves loss and gradient.
struct CrossEntropy {
  static double total_weight(const TokenBatch& batch) {
    double w = 0;
    for (const float x : batch.loss_weight) w += x;
    return w;
  }
  static void gradient(const TokenBatch& batch, double total_weight, std::vector<float>& g) {
    g.resize(batch.loss_weight.size());
    for (size_t t = 0; t < g.size(); t++) g[t] = static_cast<float>(-batch.loss_weight[t] / total_weight);
  }
  // This micro-batch's part of L.
  static double loss(const TokenBatch& batch, const std::vector<float>& logp, double total_weight) {
    double sum = 0;
    for (size_t t = 0; t < logp.size(); t++) sum -= static_cast<double>(batch.loss_weight[t]) * logp[t];
    return sum / total_weight;
  }
};

}  // namespace mm
