// One text being written: its tokens, where its keys lie, and what the scheduler must know of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/kv_space.h"
#include "engine/request.h"

namespace mm {

// A choice of a request. Tokens [0, n_computed) have keys and values (or will, by the steps under way).
struct Sequence {
  uint64_t request_id = 0;
  int choice = 0;
  std::shared_ptr<const EngineRequest> request;
  std::vector<int32_t> tokens;  // prompt and generated
  int64_t n_prompt = 0;         // of the request
  int64_t n_computed = 0;
  int64_t max_tokens = 0;  // prompt and generated, at most
  // 1 while a step under way draws a token that is not in `tokens` yet; row of that step.
  int n_pending = 0;
  int32_t pending_row = -1;
  int n_flying = 0;  // steps under way that name it
  SequenceRows rows;
  int64_t cached_tokens = 0;
  int n_fork = 0;  // choices that still wait to be split off when the prompt is done
  int64_t n_preempted = 0;
  double arrival = 0;      // seconds
  double deadline = 0;     // 0: none
  double admitted_at = 0;  // the first time; 0: not yet
  uint64_t admitted = 0;   // order of admission
  bool finished = false;
  bool speculates = false;
  std::vector<int32_t> draft;  // proposed continuation of tokens, for the next step

  bool needs_history() const {  // its next draw depends on tokens that the host must know
    const SamplingParams& s = request->sampling;
    return s.repetition_penalty != 1.0f || s.presence_penalty != 0 || s.frequency_penalty != 0 ||
           request->grammar != nullptr || speculates;
  }
  int64_t n_known() const { return static_cast<int64_t>(tokens.size()); }
  int64_t n_total() const { return n_known() + n_pending; }
  int64_t n_generated() const { return n_known() - n_prompt; }
};

}  // namespace mm
