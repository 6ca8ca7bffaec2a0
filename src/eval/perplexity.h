// Perplexity under a fixed protocol: each row alone from its beginning, cut to max_len, mean negative log-likelihood of
// a target token, summed in double. Nothing random.
#pragma once

#include <string>
#include <vector>

#include "model/model.h"
#include "tensor/device.h"
#include "text/tokenizer.h"

namespace mm {

struct PerplexityOptions {
  int64_t max_len = 512;         // ids a row at most
  bool keep_empty_think = true;  // conversations: false removes "<think>\n\n</think>\n\n" from rows where it is empty
  int64_t batch_tokens = 4096;   // a pass at most; changes speed and memory only
  Device device;
};

struct Perplexity {
  double nll = 0;  // mean over targets
  double ppl = 0;  // exp(nll)
  int64_t targets = 0, tokens = 0, rows = 0;
  double seconds = 0;
};

// paths: jsonl files (plain, .gz, .zst), all texts or all conversations. Text rows: BOS, text, EOS, every token but the
// first a target. Conversations: the answers and their end marks are the targets. Shows a progress bar. Error for
// unreadable or bad data, no targets, a max_len that the model cannot hold, and a loss that is not finite.
Perplexity perplexity(Model& model, const Tokenizer& tokenizer, const std::vector<std::string>& paths,
                      const PerplexityOptions& options);

}  // namespace mm
