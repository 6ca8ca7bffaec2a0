// The engine without its thread: requests in, step by step, events out through their sinks. Class Engine runs one
// behind a queue; Generator runs one to the end.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/progress.h"
#include "engine/draft_model.h"
#include "engine/engine.h"
#include "engine/runner.h"
#include "engine/scheduler.h"
#include "engine/stop_matcher.h"
#include "text/stream_decoder.h"

namespace mm {

// What belongs to the text of one choice, beside its Sequence.
struct Choice {
  std::optional<StreamDecoder> decoder;
  std::optional<StopMatcher> stops;
  std::optional<GrammarState> grammar;
  std::unordered_map<int32_t, LogitEdit> edits;  // penalties and biases by id
  std::vector<double> pooled;                    // embeddings: sum of hidden states
  double first_token_at = 0;
  int64_t draft_tokens = 0, accepted_tokens = 0;
};

// Not thread safe.
class EngineCore {
 public:
  // runner and its limits: what it was made with. n_vocab, d_model of the model.
  struct Setup {
    EngineOptions options;
    RunnerLimits limits;
    int64_t n_vocab = 0, d_model = 0;
  };
  EngineCore(const Setup& setup, std::unique_ptr<Runner> runner, std::optional<Tokenizer> tokenizer,
             std::unique_ptr<DraftModel> draft = nullptr);
  ~EngineCore();

  // Error naming the field, behind `prefix`; may be called from any thread.
  void check(const EngineRequest& request, const std::string& prefix = "") const;
  void add(uint64_t id, EngineRequest request, double arrival);
  void cancel(uint64_t id);
  void cancel_all();
  void fail_all(const std::string& error);  // the runner is broken: ends every request; only destruction may follow
  // Plans and submits a step, collects the oldest one under way, delivers events. False when there was nothing to do.
  bool step(double now = now_seconds());  // tests may have a clock of their own, for it and arrivals
  bool idle() const { return scheduler_.idle() && flying_.empty(); }
  int64_t n_waiting() const { return scheduler_.n_waiting(); }
  Places places() const { return scheduler_.places(); }
  void update_weights(const Model& model);  // while idle; keys and values of past texts are forgotten
  EngineStats stats() const;
  BlockMap block_map();
  void check_invariants();  // MM_CHECKs that blocks and sequences agree; for tests
  const Runner& runner() const { return *runner_; }
  const Setup& setup() const { return setup_; }

 private:
  Choice& choice_of(const Sequence& s);
  void fill_sampling(StepPlan& plan);
  void fill_row(StepBatch& batch, const Sequence& s, int choice, int64_t position, int64_t n_draft);
  void propose_drafts();
  void collect();
  void take_rows(StepItem& item, const StepPlan& plan, const StepResult& result);
  void take_hidden(StepItem& item, const StepPlan& plan, const StepResult& result);
  // Appends a drawn token; true when the sequence goes on. logits: of its row, when log-probabilities are wanted.
  bool take_token(Sequence& s, int32_t id, const float* logits, EngineEvent& event);
  void end(Sequence& s, FinishReason reason, EngineEvent& event);
  void forget(Sequence& s);  // it has ended
  void count_end(FinishReason reason);
  void stop(Sequence& s, FinishReason reason, const std::string& error);
  void stop_all(FinishReason reason, const std::string& error, const std::function<bool(const Sequence&)>& which);
  void send(const Sequence& s, EngineEvent&& event);
  void expire(double now);
  void start_choice(const Sequence& s);

  Setup setup_;
  std::unique_ptr<Runner> runner_;
  std::optional<Tokenizer> tokenizer_;
  std::unique_ptr<DraftModel> draft_;
  std::optional<TokenTable> token_table_;
  KvSpace kv_;
  Scheduler scheduler_;
  Sampler sampler_;  // log-probabilities
  std::map<std::pair<uint64_t, int>, Choice> choices_;
  std::deque<StepPlan> flying_;
  StepResult result_;
  EngineStats totals_;
  double start_;
};

}  // namespace mm
