// Runs steps: the model over a batch of tokens, and the draw of the next ones. One implementation a device, and a fake
// one in tests.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine_options.h"
#include "engine/kv_space.h"
#include "kernels/sample.h"
#include "model/model.h"

namespace mm {

// One step. Layouts as in InferStep (kernels/infer.h), on the host.
struct StepBatch {
  std::vector<RowCopy> copies;               // done before anything else, one after another
  std::vector<int32_t> ids;                  // [n_tok]; -1 - i: the token drawn for wanted row i of the step before
  std::vector<int32_t> positions, slots;     // [n_tok]
  std::vector<int32_t> cu = {0};             // [n_seq + 1]
  std::vector<int32_t> kv_len;               // [n_seq]
  std::vector<std::vector<int32_t>> tables;  // [n_seq] first row of each block
  int block_shift = 0;
  std::vector<int32_t> out_rows;      // [n_out] tokens whose continuation is drawn; one may be listed often
  std::vector<RowSampling> sampling;  // [n_out]
  std::vector<LogitEdit> edits;       // see RowSampling
  std::vector<uint32_t> masks;        // [.., ceil(n_vocab / 32)]
  std::vector<int32_t> logits_of;     // indices into out_rows whose raw logits come back
  bool hidden = false;                // embeddings: hidden states of out_rows come back, nothing is drawn

  int64_t n_tok() const { return static_cast<int64_t>(ids.size()); }
  int64_t n_seq() const { return static_cast<int64_t>(kv_len.size()); }
  int64_t n_out() const { return static_cast<int64_t>(out_rows.size()); }
  void clear() { *this = StepBatch(); }
};

struct StepResult {
  std::vector<int32_t> ids;   // [n_out] drawn tokens; -1: logits were not finite, or the mask allowed none
  std::vector<float> logits;  // [logits_of.size(), n_vocab]
  std::vector<float> hidden;  // [n_out, d_model]
};

// What a runner was made for; it plans its memory from this once.
struct RunnerLimits {
  int64_t n_row = 0;        // rows of keys and values
  int64_t max_tok = 0;      // of a step
  int64_t max_seq = 0;      // of a step
  int64_t max_out = 0;      // wanted rows of a step
  int64_t context = 0;      // positions below this
  int64_t prompt_keys = 0;  // keys of the prompts of a step together (a GPU gathers them); at least the context
};

// Used from one thread at a time.
class Runner {
 public:
  virtual ~Runner() = default;
  // Steps that may be under way at once: with 2 the next step can be submitted, with ids of -1 - i, before the result
  // of the last one was collected.
  virtual int depth() const { return 1; }
  virtual void submit(const StepBatch& batch) = 0;
  virtual void collect(StepResult& result) = 0;  // of the oldest step; waits
  // Does once, without any sequence, what the first step of every size does more slowly (memory, choice of kernels,
  // graphs).
  virtual void warm_up() {}
  virtual std::string description() const = 0;  // "cpu, 4 threads, bf16 weights, bf16 keys and values"
  virtual void update(const Model& model) = 0;  // other weights of the same shape; no step may be under way
};

// Keys and values of one token, all layers.
size_t kv_bytes_per_token(const ModelConfig& config, KvFormat format);

// The size of a GPU's step that holds n tokens: few sizes, so that few graphs and few choices of products serve all.
int64_t step_bucket(int64_t n);

// What a runner needs to be made for these options: checks them, and sizes the pool from the memory left where
// kv_tokens is 0. Error naming the option.
RunnerLimits plan_limits(const ModelConfig& config, const EngineOptions& options);

// Packs the weights for the device. Error when memory does not do.
std::unique_ptr<Runner> make_runner(const Model& model, const EngineOptions& options, const RunnerLimits& limits);

}  // namespace mm
