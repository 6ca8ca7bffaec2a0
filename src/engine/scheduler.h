// Decides what the next step computes: which sequences, how many tokens of each, where their keys go. Pure bookkeeping;
// knows no model.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/kv_space.h"
#include "engine/runner.h"
#include "engine/sequence.h"

namespace mm {

struct SchedulerOptions {
  int64_t max_sequences = 64;  // running at once
  int64_t step_tokens = 512;   // at most so many tokens a step; prompts are cut to fit
  bool static_batch = false;
  int64_t max_out = 64;             // wanted rows a step at most
  int64_t prompt_keys = INT64_MAX;  // keys of the prompts of a step together at most, but for a single prompt
  double aging_seconds = 10;        // so long a wait counts as one priority higher
};

// A sequence's part of a step: tokens [first, first + n_tok) and the rows wanted of it (in StepBatch::out_rows).
struct StepItem {
  Sequence* sequence = nullptr;
  int64_t first = 0, n_tok = 0;
  int64_t first_row = 0, n_row = 0;  // 0 rows: the middle of a prompt
};

struct StepPlan {
  std::vector<StepItem> items;
  StepBatch batch;  // filled except sampling, edits, masks, logits_of
};

// Who of those that came can run at once, and how many must wait. A request of n choices takes n places.
struct Places {
  int64_t n_free = 0;
  int64_t n_stuck = 0;  // requests for which there was none left

  bool fits(int64_t n) const { return n_stuck == 0 && n <= n_free; }  // nobody goes past one that is stuck
  void take(int64_t n) { fits(n) ? n_free -= n : n_stuck++; }
};

// Policy: sequences that decode go first (one token, and their draft), then prompts under way, then new ones while rows
// and places last. When rows run out the least urgent running sequence is put back to wait; its keys are computed again
// later (what the pool still holds is found again). The most urgent one is never put back, and the pool holds one
// sequence of full context, so some sequence always advances.
//
// Who is next of those that wait, and how long nobody waits at most:
// - Within a priority clients take turns. Next is the client that got the fewest tokens so far (virtual token counter,
//   Sheng et al. 2024), with its earliest request. But a client that has waited for a turn for aging_seconds is passed
//   by each other client once more at most. (The age of a request is no claim here, or a flood would soon be before all
//   who come later.)
// - The next ones of all priorities are compared by priority, raised by one for every aging_seconds since they arrived:
//   one is passed by nothing of d priorities more that came aging_seconds * (d + 1) later. Between equals clients count
//   as above.
// - What was put back has had its turn and counts by its arrival alone.
// Not thread safe.
class Scheduler {
 public:
  Scheduler(const SchedulerOptions& options, KvSpace& kv);

  void add(std::unique_ptr<Sequence> sequence);
  // The next step; empty when nothing can run now. in_flight: a step is not collected yet; then nothing is put back,
  // and sequences whose next draw needs its result wait.
  StepPlan plan(double now, bool in_flight);
  // A further choice of `parent`, whose prompt has been computed: shares its keys and runs beside it. When there is no
  // room it waits and computes them itself.
  Sequence& fork(Sequence& parent, int choice);
  // Tokens [0, n_tok) of the sequence are known and have their keys.
  void computed(Sequence& sequence, int64_t n_tok);
  void finish(Sequence& sequence);  // frees its rows and destroys it, once no step under way names it
  void collected();                 // the step under way has ended: destroys what finished meanwhile

  int64_t n_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t n_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t n_preempted() const { return n_preempted_; }
  Places places() const;  // after those that wait; none while rows are what they wait for
  bool idle() const { return waiting_.empty() && running_.empty(); }
  void for_each(const std::function<void(Sequence&, bool running)>& f);

 private:
  struct Client {
    double n_tok = 0;                 // computed for it
    std::map<int, double> last_turn;  // by priority: when a request of it was admitted
  };

  double turn_wanted_at(const Sequence& s) const;
  bool more_urgent(const Sequence& a, const Sequence& b, double now) const;
  size_t best_waiting(double now) const;
  void admit(double now);
  bool make_room(Sequence& s, int64_t n_tok, StepPlan& plan, bool in_flight);
  void put_back(Sequence& s);
  void add_item(StepPlan& plan, Sequence& s, int64_t n_tok, int64_t n_row);
  bool plan_decode(StepPlan& plan, Sequence& s, int64_t& budget, bool in_flight);
  void plan_prompt(StepPlan& plan, Sequence& s, int64_t& budget, int64_t& keys, bool in_flight);
  std::unique_ptr<Sequence> take(std::vector<std::unique_ptr<Sequence>>& from, const Sequence& s);

  SchedulerOptions options_;
  KvSpace& kv_;
  std::vector<std::unique_ptr<Sequence>> waiting_, running_, finished_;
  std::map<std::string, Client> clients_;
  std::vector<RowCopy> copies_;  // of forks, for the next step
  uint64_t n_admitted_ = 0;
  int64_t n_preempted_ = 0;
  bool turn_of_embeddings_ = false, rows_scarce_ = false;
};

}  // namespace mm
