// Speculative decoding with a second, smaller model of the same vocabulary (Leviathan et al. 2023). It writes a few
// tokens ahead with the random numbers that the large model will draw with; what the large model then draws otherwise
// is dropped, so the text is the large model's, token by token.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine/kv_space.h"
#include "engine/runner.h"
#include "engine/sequence.h"

namespace mm {

// Not thread safe.
class DraftModel {
 public:
  DraftModel(std::unique_ptr<Runner> runner, const RunnerLimits& limits, int64_t block_size);
  // Fills `draft` of every sequence with up to k tokens (fewer where its own rows run out). All known tokens of a
  // sequence must lie below the context.
  void propose(std::span<Sequence* const> sequences, int64_t k);
  void release(const Sequence& sequence);  // it ended, or waits again
  void check(int64_t n_sequence) const;    // MM_CHECKs that at most so many are held; for tests

 private:
  struct State {
    SequenceRows rows;
    int64_t n_computed = 0;
  };
  bool reserve(State& state, int64_t n_tok);
  void step(std::span<Sequence* const> sequences);

  std::unique_ptr<Runner> runner_;
  RunnerLimits limits_;
  KvSpace kv_;
  std::map<const Sequence*, State> states_;
  std::vector<RowCopy> copies_;  // stays empty: nothing is shared here
};

// The row parameters of a request's draw behind `position`, without penalties and masks.
RowSampling plain_row(const EngineRequest& request, int choice, int64_t position);

}  // namespace mm
