// How fast the engine prefills and decodes on this machine, beside what reading the weights and the keys and values
// costs at least.
#pragma once

#include <functional>
#include <vector>

#include "base/json.h"
#include "engine/engine_options.h"
#include "model/model.h"

namespace mm {

struct InferBenchOptions {
  EngineOptions engine;  // kv_tokens, context, max_sequences and queue_limit are made to fit where they are too small
  const Model* draft = nullptr;  // writes ahead, as for class Engine
  std::vector<int> threads;      // 0: all cores; none: as many as are set, and all that is restored behind the last row
  std::vector<WeightFormat> weights{WeightFormat::bf16};
  std::vector<KvFormat> kv{KvFormat::bf16};
  std::vector<int64_t> batch{1};
  std::vector<int64_t> length{512};  // prefill: tokens of each prompt; decode: tokens before the first that is timed
  int64_t n_tok = 128;               // decode: timed tokens of each sequence
  int64_t rounds = 5;                // the median counts; one more before them for warm-up
  bool sampled = false;              // draw by the default sampling in place of the largest logit
};

// A row for every combination, in the order threads, weights, kv, batch, length; the engine is made anew for each of
// the first three.
//
// decode:  {"weights", "kv", "threads", "batch", "depth", "tokens_per_second", "lowest", "highest", "step_ms",
//           "step_bytes", "gbytes_per_second", "limit_gbytes_per_second", "share_of_limit"}: all sequences together,
//           while all of them decode. The limit: what the same threads reach that only read so many bytes, measured
//           right after (on a GPU, what memory moves). Where drafts make several tokens a step, step_ms is the time of
//           a token and what counts bytes is null.
// prefill: {"weights", "kv", "threads", "batch", "length", "tokens_per_second", "lowest", "highest", "ttft_ms",
//           "gflops"}: from the first prompt's submission to the last one's first token
//
// Beside the rows: "threads" (the most of them) with the "bandwidth" that they reach, and "engine", null where the
// rows' engines differ. Through class Engine, as a server uses it: scheduling and drawing included. `on_row` sees each
// row as it is done.
ordered_json bench_decode(const Model& model, const InferBenchOptions& options,
                          const std::function<void(const ordered_json&)>& on_row);
ordered_json bench_prefill(const Model& model, const InferBenchOptions& options,
                           const std::function<void(const ordered_json&)>& on_row);

// Bytes that one decode step of `batch` sequences with `depth` tokens each must read: every weight once (of a mixture,
// the experts in use) and all keys and values.
double decode_step_bytes(const ModelConfig& config, WeightFormat weights, KvFormat kv, int64_t batch, double depth);

}  // namespace mm
