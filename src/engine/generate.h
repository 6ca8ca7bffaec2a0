// Text from a model, called and waited for: an engine that runs a list of requests to its end.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine_options.h"
#include "engine/request.h"
#include "model/model.h"
#include "tensor/device.h"
#include "text/tokenizer.h"

namespace mm {

class EngineCore;

struct GenerateRequest {
  std::vector<int32_t> prompt;  // at least one id, fewer than the context
  SamplingParams sampling;
  uint64_t stream = 0;  // random stream: sequences of one seed that should differ take different ones
  int64_t max_new_tokens = 256;
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_strings;   // need a tokenizer
  int64_t logprobs = -1;                   // -1: none; n >= 0: of every generated token and of the n most probable ones
  std::shared_ptr<const Grammar> grammar;  // what the text must match, or null
};

struct GenerateResult {
  std::vector<int32_t> ids;  // generated ones, a stop id included
  std::string text;          // without special tokens, and up to the stop id or string; "" without a tokenizer
  FinishReason finish = FinishReason::length;
  std::vector<float> logprobs;                    // [ids], raw log-softmax; empty unless asked for
  std::vector<std::vector<TokenLogprob>> top;     // [ids][n], best first
  int64_t cached_tokens = 0;                      // of the prompt, taken from the cache (reuse_prefix)
  int64_t draft_tokens = 0, accepted_tokens = 0;  // speculative decoding
  double prefill_seconds = 0;                     // until the first token was drawn, from the start of the run
  double decode_seconds = 0;                      // from then to the last token
};

// Called for every token as it comes: index of the request, its id, and the text that became certain (may be empty).
// Returning false cancels that sequence.
using TokenSink = std::function<bool(size_t request, int32_t id, std::string_view text)>;

struct GeneratorOptions {
  int64_t max_sequences = 1;    // at once; more requests wait for a free place
  int64_t context = 0;          // tokens a sequence at most; 0: the model's max_position_embeddings
  int64_t prefill_chunk = 256;  // prompt tokens a step at most, of all sequences together
  // Keep the keys and values of past sequences and reuse them for prompts that begin alike (a conversation that goes
  // on).
  bool reuse_prefix = false;
  int64_t ngram_draft = 0;  // see EngineOptions
  Device device;
  std::optional<WeightFormat> weights;  // none: as the device computes
  std::optional<KvFormat> kv;           // likewise
  KvLayout kv_layout = KvLayout::paged;
  bool batch_invariant = false, warm_up = false;

  EngineOptions engine_options(const ModelConfig& config) const;
};

// Owns an engine: packed weights, keys and values, buffers, allocated once; memory is touched as sequences grow. One
// run at a time; not thread safe. What a sequence generates depends on its request alone, not on the others in the run
// (up to the rounding of matrix products of other shapes).
class Generator {
 public:
  Generator(const Model& model, std::optional<Tokenizer> tokenizer, const GeneratorOptions& options);
  ~Generator();

  // Error naming the request, before anything runs, when one is malformed or its prompt leaves no room for a token;
  // Error when logits are not finite. What the sink throws passes through. After an Error the next run starts afresh.
  std::vector<GenerateResult> run(std::span<const GenerateRequest> requests, const TokenSink& sink = nullptr);
  // The model was trained meanwhile: computes with its weights of now, forgets kept keys and values.
  void update_weights(const Model& model);
  int64_t context() const;

 private:
  std::unique_ptr<EngineCore> core_;
  uint64_t next_id_ = 1;
};

}  // namespace mm
