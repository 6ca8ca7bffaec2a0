// Negative log-likelihood of a data set: what validation and perplexity report.
#pragma once

#include "data/loader.h"
#include "model/forward.h"
#include "model/lm_head.h"

namespace mm {

struct NllSum {
  double nll = 0;  // summed over targets
  int64_t targets = 0, tokens = 0, rows = 0;
  double mean() const { return targets > 0 ? nll / static_cast<double>(targets) : 0.0; }
};

// Every row alone in its sequence, at most acts.max_tok() tokens a pass (rows must not be longer), summed in double in
// the rows' order. on_batch(tokens done) is called after each pass; returning false ends the sum early.
template <class F>
NllSum sum_nll(const Device& dev, Model& model, const TokenDataset& data, Activations& acts, LmHead& head,
               F&& on_batch) {
  NllSum sum;
  SequentialBatches batches(data, acts.max_tok());
  std::vector<float> logp;
  for (TokenBatch batch; batches.next(batch);) {
    forward(dev, model, batch, acts);
    logp.resize(batch.targets.size());
    head.logprob(dev, model, acts.h, batch.targets, logp.data());
    for (size_t t = 0; t < logp.size(); t++) {
      if (batch.targets[t] < 0) continue;
      sum.nll -= logp[t];
      sum.targets++;
    }
    sum.tokens += batch.n_tok();
    sum.rows += batch.n_seq();
    if (!on_batch(sum.tokens)) break;
  }
  return sum;
}

}  // namespace mm
