#include "train/sentry.h"

#include <algorithm>
#include <cmath>

#include "tensor/host_copy.h"
#include "train/gpu_step.h"

namespace mm {

// Index of the first NaN or infinity of a dense view, -1 if none.
static int64_t first_bad(const Device& dev, const View& v) {
  if (!v) return -1;
  const std::vector<float> values = host_floats(dev, v);
  const auto bad = std::find_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
  return bad == values.end() ? -1 : bad - values.begin();
}

static std::string bad_rows(const TokenBatch& batch, const TokenDataset& data, int64_t token) {
  for (int64_t s = 0; s < batch.n_seq(); s++) {
    if (token < batch.cu_seqlens[static_cast<size_t>(s) + 1]) {
      const bool known = s < static_cast<int64_t>(batch.sample.size());
      return fmt::format(
          "token {} of {}", token - batch.cu_seqlens[static_cast<size_t>(s)],
          known ? data.source_text(batch.sample[static_cast<size_t>(s)]) : fmt::format("sequence {}", s));
    }
  }
  return "an unknown sample";
}

static std::string bad_activation(const Device& dev, const Activations& acts, const TokenBatch& batch,
                                  const TokenDataset& data) {
  const auto describe = [&](const View& v, const std::string& name) {
    const int64_t i = first_bad(dev, v);
    return i < 0 ? std::string() : fmt::format("activation {}, first at {}", name, bad_rows(batch, data, i / v.cols()));
  };
  for (size_t l = 0; l < acts.layers.size(); l++) {
    const LayerActs& a = acts.layers[l];
    const std::pair<const View*, const char*> order[] = {
        {&a.x_in, "input"}, {&a.qkv, "qkv"}, {&a.attn, "attention output"}, {&a.x_mid, "residual after attention"}};
    for (const auto& [view, what] : order) {
      if (std::string s = describe(*view, fmt::format("layer {} {}", l, what)); !s.empty()) return s;
    }
    const View ffn = a.gate_up;
    if (a.scores) {
      if (std::string s = describe(a.scores, fmt::format("layer {} router scores", l)); !s.empty()) return s;
    } else if (std::string s = describe(ffn, fmt::format("layer {} gate and up", l)); !s.empty()) {
      return s;
    }
  }
  if (std::string s = describe(acts.x_out, "residual after the last layer"); !s.empty()) return s;
  return describe(acts.h, "final norm");
}

std::string explain_non_finite(const Device& dev, TrainStep& step, const std::vector<TokenBatch>& micro_batches,
                               int64_t number, const TokenDataset& data) {
  Model& model = step.model();
  for (const ParamSpec& spec : model.table.specs()) {
    const int64_t i = first_bad(dev, model.weights.view(spec));
    if (i >= 0) return fmt::format("weight {} at element {}", spec.hf_name, i);
  }
  size_t micro = 0;
  std::vector<TokenBatch> passes;
  for (const TokenBatch& b : micro_batches) {
    for (TokenBatch& part : split_batch(b, step.activations().max_tok())) passes.push_back(std::move(part));
  }
  for (const TokenBatch& batch : passes) {
    forward(dev, model, batch, step.activations(), nullptr, step.dropout_key(number, micro++));
    if (std::string s = bad_activation(dev, step.activations(), batch, data); !s.empty()) return s;
    std::vector<float> logp(batch.targets.size());
    step.head().logprob(dev, model, step.activations().h, batch.targets, logp.data());
    const auto bad = std::find_if(logp.begin(), logp.end(), [](float x) { return !std::isfinite(x); });
    if (bad != logp.end()) return "log-probability, first at " + bad_rows(batch, data, bad - logp.begin());
  }
  for (const ParamSpec& spec : model.table.specs()) {
    if (first_bad(dev, step.gradients().view(spec)) >= 0) return "gradient of " + spec.hf_name;
  }
  return "the gradient norm (it overflows although every element is finite)";
}

}  // namespace mm
