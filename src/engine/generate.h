// Text from a model: prefill in chunks, decode with a KV cache, several sequences at once.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/sampler.h"
#include "model/model.h"
#include "tensor/device.h"
#include "text/tokenizer.h"

namespace mm {

struct GenerateRequest {
  std::vector<int32_t> prompt;  // at least one id, fewer than the context
  SamplingParams sampling;
  uint64_t stream = 0;  // random stream: sequences of one seed that should differ take different ones
  int64_t max_new_tokens = 256;
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_strings;  // need a tokenizer
  int64_t logprobs = -1;                  // -1: none; n >= 0: of every generated token and of the n most probable ones
};

enum class FinishReason { stop, length, cancelled };
const char* finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::vector<int32_t> ids;  // generated ones, a stop id included
  std::string text;          // without special tokens, and up to the stop id or string; "" without a tokenizer
  FinishReason finish = FinishReason::length;
  std::vector<float> logprobs;                 // [ids], raw log-softmax; empty unless asked for
  std::vector<std::vector<TokenLogprob>> top;  // [ids][n], best first
  int64_t cached_tokens = 0;                   // of the prompt, taken from the cache (reuse_prefix)
  double prefill_seconds = 0;                  // until the first token was drawn, from the start of the run
  double decode_seconds = 0;                   // from then to the last token
};

// Called for every token as it comes: index of the request, its id, and the text that became certain (may be empty).
// Returning false cancels that sequence.
using TokenSink = std::function<bool(size_t request, int32_t id, std::string_view text)>;

struct GeneratorOptions {
  int64_t max_sequences = 1;    // at once; more requests wait for a free place
  int64_t context = 0;          // tokens a sequence at most; 0: the model's max_position_embeddings
  int64_t prefill_chunk = 256;  // prompt tokens a forward at most, of all sequences together
  // Keep the keys and values of a place's last sequence and reuse them for a prompt that begins alike (a conversation
  // that goes on). Only while the weights do not change.
  bool reuse_prefix = false;
  Device device;
};

// Owns the KV cache and the buffers of forward; they are allocated once, and memory is touched as sequences grow. One
// run at a time; not thread safe; model must outlive it and may be trained between runs. What a sequence generates
// depends on its request alone, not on the others in the run (up to the rounding of matrix products of other shapes).
class Generator {
 public:
  Generator(Model& model, std::optional<Tokenizer> tokenizer, const GeneratorOptions& options);
  ~Generator();

  // Error naming the request, before anything runs, when one is malformed or its prompt leaves no room for a token;
  // Error when logits are not finite. What the sink throws passes through. After an Error the next run starts afresh.
  std::vector<GenerateResult> run(std::span<const GenerateRequest> requests, const TokenSink& sink = nullptr);
  int64_t context() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
