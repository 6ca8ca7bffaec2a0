#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/progress.h"
#include "data/dataset.h"
#include "model/nll.h"

namespace mm {

Perplexity perplexity(Model& model, const Tokenizer& tokenizer, const std::vector<std::string>& paths,
                      const PerplexityOptions& options) {
  MM_CHECK(!paths.empty());
  const int64_t limit = model.config.max_position_embeddings;
  if (options.max_len < 2 || options.max_len > limit) {
    throw Error("max-len", fmt::format("2 to {} (the model's max_position_embeddings)", limit),
                fmt::format("{}", options.max_len));
  }
  if (options.batch_tokens < 1) throw Error("batch-tokens", "at least 1", fmt::format("{}", options.batch_tokens));
  SampleOptions rows = SampleOptions::evaluation(detect_kind(paths[0]), options.max_len);
  rows.empty_think_ratio = options.keep_empty_think ? 1.0 : 0.0;
  const TokenDataset data = TokenDataset::build(paths, tokenizer, rows, /*cache_dir=*/"");
  if (data.targets() == 0) throw Error(paths[0], "rows with tokens to predict", "none");

  const int64_t max_tok = std::min(std::max(options.batch_tokens, data.max_row_len()), data.tokens());
  std::unique_ptr<Model> replica;
  if (options.device.on_gpu()) replica = model.replica(options.device, data.max_row_len());
  Model& computing = replica ? *replica : model;
  Activations acts(model.config, max_tok, /*train=*/false, options.device);
  LmHead head(model.config, options.device);
  Progress progress("perplexity", data.tokens(), "tok");
  const double start = now_seconds();
  const NllSum sum = sum_nll(options.device, computing, data, acts, head, [&](int64_t tokens) {
    progress.set(tokens);
    return true;
  });
  progress.finish();
  if (!std::isfinite(sum.nll)) {
    throw Error("loss", "a finite number", fmt::format("{}", sum.nll), "the model's weights are broken");
  }
  return {.nll = sum.mean(),
          .ppl = std::exp(sum.mean()),
          .targets = sum.targets,
          .tokens = sum.tokens,
          .rows = sum.rows,
          .seconds = now_seconds() - start};
}

}  // namespace mm
