// The engine's bookkeeping under a fake runner: random traffic, and checks after every step.
#include "engine/engine_core.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/rng.h"

namespace mm {

namespace {

constexpr int64_t n_vocab = 101;

// A model whose next token is a function of the whole text so far. It keeps, row by row, the token and the hash of the
// text up to it; a step reads its past through the table, so a wrong row, block or copy gives a wrong token.
class FakeRunner : public Runner {
 public:
  // wrong_every: every so many draws it says something else (a draft model that is not the large one); 0: never.
  FakeRunner(int64_t n_row, int depth, uint64_t wrong_every = 0)
      : rows_(static_cast<size_t>(n_row)), depth_(depth), wrong_every_(wrong_every) {}
  int depth() const override { return depth_; }
  std::string description() const override { return "fake"; }
  void update(const Model&) override {}
  static uint64_t extend(uint64_t hash, int32_t token) {
    return (hash ^ static_cast<uint64_t>(token + 1)) * 0x9E3779B97F4A7C15u + 12345;
  }
  static int32_t next(uint64_t hash, const RowSampling& r) {
    const auto u = philox4x32(hash, r.seed ^ r.stream, r.index)[0];
    return static_cast<int32_t>(u % n_vocab);
  }

  void submit(const StepBatch& b) override {
    n_steps++;
    for (const RowCopy& c : b.copies)
      for (int32_t i = 0; i < c.count; i++)
        rows_[static_cast<size_t>(c.to + i)] = rows_[static_cast<size_t>(c.from + i)];
    StepResult result;
    std::vector<uint64_t> hashes;
    std::map<int32_t, int64_t> written;
    for (int64_t s = 0; s < b.n_seq(); s++) {
      const auto i = static_cast<size_t>(s);
      const int32_t n = b.cu[i + 1] - b.cu[i], past = b.kv_len[i] - n;
      const auto row_of = [&](int32_t j) {
        const int32_t start = b.tables[i][static_cast<size_t>(j >> b.block_shift)];
        return start + (j & ((1 << b.block_shift) - 1));
      };
      uint64_t hash = 0;
      for (int32_t j = 0; j < past; j++) hash = extend(hash, rows_[static_cast<size_t>(row_of(j))]);
      for (int32_t t = b.cu[i]; t < b.cu[i + 1]; t++) {
        int32_t id = b.ids[static_cast<size_t>(t)];
        if (id < 0) id = last_ids_.at(static_cast<size_t>(-1 - id));
        const int32_t position = b.positions[static_cast<size_t>(t)];
        MM_CHECK(position == past + t - b.cu[i]);
        MM_CHECK(b.slots[static_cast<size_t>(t)] == row_of(position), "slot {} is not row {}",
                 b.slots[static_cast<size_t>(t)], row_of(position));
        MM_CHECK(++written[row_of(position)] == 1, "two tokens of a step in one row");
        rows_[static_cast<size_t>(row_of(position))] = id;
        hash = extend(hash, id);
        hashes.push_back(hash);
      }
    }
    for (int64_t i = 0; i < b.n_out(); i++) {
      const int32_t id =
          next(hashes[static_cast<size_t>(b.out_rows[static_cast<size_t>(i)])], b.sampling[static_cast<size_t>(i)]);
      const bool wrong = wrong_every_ > 0 && ++n_drawn_ % wrong_every_ == 0;
      result.ids.push_back(wrong ? (id + 1) % static_cast<int32_t>(n_vocab) : id);
    }
    last_ids_ = result.ids;
    MM_CHECK(static_cast<int>(queue_.size()) < depth_);
    queue_.push_back(std::move(result));
  }
  void collect(StepResult& result) override {
    MM_CHECK(!queue_.empty());
    result = std::move(queue_.front());
    queue_.pop_front();
  }
  int64_t n_steps = 0;

 private:
  std::vector<int32_t> rows_, last_ids_;
  std::deque<StepResult> queue_;
  int depth_;
  uint64_t wrong_every_, n_drawn_ = 0;
};

// What the fake model writes behind a prompt, without any engine.
std::vector<int32_t> expected_text(const EngineRequest& r, int choice, int64_t context) {
  uint64_t hash = 0;
  for (const int32_t t : r.prompt) hash = FakeRunner::extend(hash, t);
  std::vector<int32_t> ids;
  const int64_t most = std::min<int64_t>(r.max_new_tokens, context - static_cast<int64_t>(r.prompt.size()));
  while (static_cast<int64_t>(ids.size()) < most) {
    const RowSampling row{.seed = r.sampling.seed,
                          .stream = r.stream + static_cast<uint64_t>(choice),
                          .index = r.prompt.size() + ids.size()};
    ids.push_back(FakeRunner::next(hash, row));
    hash = FakeRunner::extend(hash, ids.back());
    if (std::find(r.stop_ids.begin(), r.stop_ids.end(), ids.back()) != r.stop_ids.end()) break;
  }
  return ids;
}

struct Traffic {
  KvLayout layout = KvLayout::paged;
  int depth = 1;
  int64_t block_size = 4, n_row = 256, context = 64, max_sequences = 8, step_tokens = 16;
  int64_t ngram_draft = 0, draft_tokens = 0;
  uint64_t draft_wrong_every = 0;
  bool static_batch = false, prefix_cache = true;
  int n_requests = 120;
  double cancel_share = 0.1;
  uint64_t seed = 1;
};

struct Answer {
  std::vector<int32_t> ids;
  int n_finished = 0;
  FinishReason finish = FinishReason::error;
};

struct Outcome {
  EngineStats stats;
  int64_t n_steps = 0;
};

// Runs the traffic to its end and checks every answer.
Outcome run_traffic(const Traffic& t) {
  EngineCore::Setup setup;
  setup.options.kv_layout = t.layout;
  setup.options.block_size = t.block_size;
  setup.options.max_sequences = t.max_sequences;
  setup.options.static_batch = t.static_batch;
  setup.options.prefix_cache = t.prefix_cache;
  setup.options.ngram_draft = t.ngram_draft;
  setup.options.draft_tokens = t.draft_tokens;
  setup.limits = {.n_row = t.n_row,
                  .max_tok = t.step_tokens,
                  .max_seq = t.max_sequences,
                  .max_out = std::max<int64_t>(16, t.max_sequences * (1 + std::max(t.ngram_draft, t.draft_tokens))),
                  .context = t.context};
  setup.n_vocab = n_vocab;
  setup.d_model = 8;
  auto runner = std::make_unique<FakeRunner>(t.n_row, t.depth);
  FakeRunner* fake = runner.get();
  std::unique_ptr<DraftModel> draft;
  if (t.draft_tokens > 0) {
    RunnerLimits limits = setup.limits;
    limits.n_row = t.max_sequences * t.context / 2;  // too few for all
    draft = std::make_unique<DraftModel>(std::make_unique<FakeRunner>(limits.n_row, 1, t.draft_wrong_every), limits, 4);
  }
  EngineCore core(setup, std::move(runner), std::nullopt, std::move(draft));

  Rng rng{t.seed, 7};
  std::vector<EngineRequest> requests;
  std::map<uint64_t, std::map<int, Answer>> answers;
  std::map<uint64_t, bool> cancelled;
  std::vector<int32_t> common;
  for (int i = 0; i < 40; i++) common.push_back(static_cast<int32_t>(rng.below(n_vocab)));
  for (int i = 0; i < t.n_requests; i++) {
    EngineRequest r;
    const auto shared = rng.below(3) == 0 ? rng.below(40) : 0;
    r.prompt.assign(common.begin(), common.begin() + static_cast<std::ptrdiff_t>(shared));
    // Few distinct tokens, so that n-grams come back.
    for (uint64_t n = 1 + rng.below(20); n > 0; n--) r.prompt.push_back(static_cast<int32_t>(rng.below(4)));
    r.prompt.resize(std::min<size_t>(r.prompt.size(), static_cast<size_t>(t.context - 1)));
    r.max_new_tokens = 1 + static_cast<int64_t>(rng.below(30));
    r.sampling.seed = rng.below(5);
    r.stream = rng.below(100);
    r.n = rng.below(5) == 0 ? 1 + static_cast<int>(rng.below(3)) : 1;
    r.priority = static_cast<int>(rng.below(3));
    r.client = std::string(1, static_cast<char>('a' + rng.below(3)));
    if (rng.below(4) == 0) r.sampling.repetition_penalty = 1.1f;  // needs the history: no token ahead of the host
    r.stop_ids = {static_cast<int32_t>(rng.below(n_vocab))};
    requests.push_back(r);
  }
  size_t sent = 0;
  int64_t idle_steps = 0;
  while (sent < requests.size() || !core.idle()) {
    while (sent < requests.size() && rng.below(3) == 0) {
      EngineRequest r = requests[sent];
      const uint64_t id = sent + 1;
      r.sink = [&answers, id](EngineEvent&& e) {
        Answer& a = answers[id][e.choice];
        EXPECT_EQ(a.n_finished, 0) << "an event behind the last one";
        a.ids.insert(a.ids.end(), e.ids.begin(), e.ids.end());
        if (!e.finished) return;
        a.n_finished++;
        a.finish = e.finish;
        if (e.finish != FinishReason::error) {
          EXPECT_EQ(e.completion_tokens, static_cast<int64_t>(a.ids.size()));
        }
      };
      core.check(r);
      core.add(id, std::move(r), static_cast<double>(sent));
      sent++;
    }
    if (sent > 0 && rng.uniform() < t.cancel_share / 8) {
      const uint64_t id = 1 + rng.below(sent);
      cancelled[id] = true;
      core.cancel(id);
    }
    idle_steps = core.step() ? 0 : idle_steps + 1;
    core.check_invariants();
    EXPECT_LT(idle_steps, 100) << "nothing advances";
    if (idle_steps >= 100) break;
  }
  for (size_t i = 0; i < requests.size(); i++) {
    const uint64_t id = i + 1;
    EXPECT_EQ(answers[id].size(), static_cast<size_t>(requests[i].n)) << "request " << id;
    for (const auto& [choice, a] : answers[id]) {
      EXPECT_EQ(a.n_finished, 1) << "request " << id << " choice " << choice;
      std::vector<int32_t> expected = expected_text(requests[i], choice, t.context);
      if (a.finish == FinishReason::cancelled) {
        EXPECT_TRUE(cancelled[id]);
        expected.resize(std::min(expected.size(), a.ids.size()));
      }
      EXPECT_EQ(a.ids, expected) << "request " << id << " choice " << choice;
    }
  }
  const EngineStats s = core.stats();
  EXPECT_EQ(s.n_block_used, 0) << "leaked blocks";
  EXPECT_EQ(s.n_running + s.n_waiting, 0);
  return {s, fake->n_steps};
}

TEST(EngineCore, RandomTrafficEveryLayout) {
  for (uint64_t seed = 1; seed <= 8; seed++) {
    for (const int depth : {1, 2}) {
      SCOPED_TRACE(fmt::format("seed {} depth {}", seed, depth));
      run_traffic({.depth = depth, .seed = seed});
      run_traffic({.layout = KvLayout::preallocated, .depth = depth, .n_row = 8 * 64, .seed = seed});
      run_traffic({.layout = KvLayout::concat, .depth = depth, .n_row = 3 * 64 + 100, .seed = seed});
    }
  }
}

TEST(EngineCore, AScarcePoolPutsSequencesBackAndLosesNothing) {
  int64_t put_back = 0;
  for (uint64_t seed = 1; seed <= 8; seed++)
    for (const int depth : {1, 2})
      put_back += run_traffic({.depth = depth, .n_row = 72, .seed = seed}).stats.n_preempted;
  EXPECT_GT(put_back, 20);
}

TEST(EngineCore, SpeculationChangesNoToken) {
  for (const int depth : {1, 2}) {
    int64_t accepted = 0;  // by luck: the fake model's texts do not repeat themselves
    for (uint64_t seed = 1; seed <= 8; seed++) {
      const Outcome o = run_traffic({.depth = depth, .step_tokens = 40, .ngram_draft = 3, .seed = seed});
      accepted += o.stats.accepted_tokens;
      EXPECT_GE(o.stats.draft_tokens, o.stats.accepted_tokens);
    }
    EXPECT_GT(accepted, 0) << "depth " << depth;
  }
}

TEST(EngineCore, ADraftModelChangesNoToken) {
  for (uint64_t seed = 1; seed <= 4; seed++) {
    for (const uint64_t wrong_every : {0, 2, 5}) {
      for (const int64_t n_row : {256, 72}) {
        SCOPED_TRACE(fmt::format("seed {} wrong every {} rows {}", seed, wrong_every, n_row));
        const Outcome o = run_traffic({.depth = seed % 2 == 0 ? 2 : 1,
                                       .n_row = n_row,
                                       .step_tokens = 40,
                                       .draft_tokens = 3,
                                       .draft_wrong_every = wrong_every,
                                       .cancel_share = 0,
                                       .seed = seed});
        EXPECT_GT(o.stats.accepted_tokens, 200);
        // A draft model that equals the large one is refused nothing but what lies behind a text's end.
        const auto refused = static_cast<double>(o.stats.draft_tokens - o.stats.accepted_tokens);
        if (wrong_every == 0) {
          EXPECT_LT(refused, 0.25 * static_cast<double>(o.stats.draft_tokens));
        }
      }
    }
  }
}

TEST(EngineCore, StaticBatchesTakeMoreSteps) {
  const int64_t continuous = run_traffic({.cancel_share = 0}).n_steps;
  const int64_t fixed = run_traffic({.static_batch = true, .cancel_share = 0}).n_steps;
  EXPECT_GT(fixed, continuous);
}

TEST(EngineCore, ThePrefixCacheSavesWork) {
  const EngineStats with = run_traffic({.cancel_share = 0}).stats;
  const EngineStats without = run_traffic({.prefix_cache = false, .cancel_share = 0}).stats;
  EXPECT_GT(with.cached_tokens, 0);
  EXPECT_EQ(without.cached_tokens, 0);
  EXPECT_LT(with.computed_tokens, without.computed_tokens);
  EXPECT_EQ(with.prompt_tokens, without.prompt_tokens);
}

}  // namespace

}  // namespace mm
