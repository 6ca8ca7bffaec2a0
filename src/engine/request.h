// What is asked of the engine and what it answers, event by event.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/sampler.h"
#include "grammar/grammar.h"

namespace mm {

enum class FinishReason {
  stop,       // a stop id, a stop string, or a grammar that is complete
  length,     // max_new_tokens or the context
  cancelled,  // by the caller
  timeout,    // its deadline passed
  error,      // see EngineEvent::error
};
const char* finish_reason_name(FinishReason reason);

struct EngineEvent {
  int choice = 0;                              // of n
  std::vector<int32_t> ids;                    // tokens since the last event of this choice (a stop id included)
  std::string text;                            // what became certain: whole characters, nothing of a stop string
  std::vector<float> logprobs;                 // [ids] raw log-softmax; empty unless asked for
  std::vector<std::vector<TokenLogprob>> top;  // [ids][n], best first
  std::vector<float> embedding;                // of an embedding request, in its only event
  bool finished = false;                       // the choice's last event
  FinishReason finish = FinishReason::stop;
  std::string error;  // one line
  // In the last event of a choice
  int64_t prompt_tokens = 0, completion_tokens = 0;  // cached: of the prompt, found in the prefix cache
  int64_t cached_tokens = 0, draft_tokens = 0, accepted_tokens = 0;
  double queue_seconds = 0, first_token_seconds = 0, total_seconds = 0;  // since submission
};

struct EngineRequest {
  std::vector<int32_t> prompt;  // at least one id, fewer than the context
  SamplingParams sampling;
  std::vector<std::pair<int32_t, float>> logit_bias;  // id, added to the logit
  int n = 1;                                          // choices; choice i draws from random stream `stream` + i
  uint64_t stream = 0;
  int64_t max_new_tokens = 256;  // cut to what the context leaves
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_strings;
  bool skip_special = true;  // text without special tokens
  int64_t logprobs = -1;     // -1: none; n >= 0: of every generated token and of the n most probable ones
  std::shared_ptr<const Grammar> grammar;
  int priority = 0;             // higher goes first
  double deadline_seconds = 0;  // from submission; 0: none
  std::string client;           // requests of one priority take turns by client
  bool embed = false;           // no tokens: the mean of the final hidden states, of length 1
  // Called on the engine's thread for every event, in order a choice: must be quick, must not throw, must not call the
  // engine but for cancel(). After the last choice's finished event it is not called again.
  std::function<void(EngineEvent&&)> sink;
};

}  // namespace mm
