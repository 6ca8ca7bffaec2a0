// The engine's bookkeeping under a fake runner: random traffic, and checks after every step.
#include "engine/engine_core.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/rng.h"
#include "engine/fake_runner.h"

namespace mm {

namespace {

struct Traffic {
  KvLayout layout = KvLayout::paged;
  int depth = 1;
  int64_t block_size = 4, n_row = 256, context = 64, max_sequences = 8, step_tokens = 16;
  int64_t ngram_draft = 0, draft_tokens = 0;
  uint64_t draft_wrong_every = 0;
  bool static_batch = false, prefix_cache = true;
  int n_requests = 120;
  double cancel_share = 0.1;
  size_t most_open = 24;  // choices asked for and not ended
  uint64_t seed = 1;
};

struct Answer {
  std::vector<int32_t> ids;
  int n_finished = 0;
  int64_t sent_at = 0, first_at = -1;  // steps
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
  setup.n_vocab = fake_vocab;
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
  for (int i = 0; i < 40; i++) common.push_back(static_cast<int32_t>(rng.below(fake_vocab)));
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
    r.stop_ids = {static_cast<int32_t>(rng.below(fake_vocab))};
    requests.push_back(r);
  }
  size_t sent = 0;
  size_t open = 0;
  int64_t idle_steps = 0, at = 0;
  while (sent < requests.size() || !core.idle()) {
    while (sent < requests.size() && open < t.most_open && rng.below(3) == 0) {
      EngineRequest r = requests[sent];
      const uint64_t id = sent + 1;
      for (int choice = 0; choice < r.n; choice++) answers[id][choice].sent_at = at;
      open += static_cast<size_t>(r.n);
      r.sink = [&answers, &at, &open, id](EngineEvent&& e) {
        Answer& a = answers[id][e.choice];
        EXPECT_EQ(a.n_finished, 0) << "an event behind the last one";
        a.ids.insert(a.ids.end(), e.ids.begin(), e.ids.end());
        if (a.first_at < 0) a.first_at = at;
        if (!e.finished) return;
        a.n_finished++;
        open--;
        a.finish = e.finish;
        if (e.finish != FinishReason::error) {
          EXPECT_EQ(e.completion_tokens, static_cast<int64_t>(a.ids.size()));
        }
      };
      core.check(r);
      core.add(id, std::move(r), static_cast<double>(1 + at));
      sent++;
    }
    if (sent > 0 && rng.uniform() < t.cancel_share / 8) {
      const uint64_t id = 1 + rng.below(sent);
      cancelled[id] = true;
      core.cancel(id);
    }
    idle_steps = core.step(static_cast<double>(1 + ++at)) ? 0 : idle_steps + 1;
    core.check_invariants();
    EXPECT_LT(idle_steps, 100) << "nothing advances";
    if (idle_steps >= 100) break;
  }
  // Who is open for N steps a request, on average, waits for its first token no more than 2.5 times that, and what
  // two priorities less may cost: nobody is passed by again and again.
  const double fair = static_cast<double>(t.most_open) * static_cast<double>(at) / static_cast<double>(t.n_requests);
  int64_t waited = 0;
  for (size_t i = 0; i < requests.size(); i++) {
    const uint64_t id = i + 1;
    EXPECT_EQ(answers[id].size(), static_cast<size_t>(requests[i].n)) << "request " << id;
    for (const auto& [choice, a] : answers[id]) {
      waited = std::max(waited, a.first_at - a.sent_at);
      EXPECT_EQ(a.n_finished, 1) << "request " << id << " choice " << choice;
      std::vector<int32_t> expected = expected_text(requests[i], choice, t.context);
      if (a.finish == FinishReason::cancelled) {
        EXPECT_TRUE(cancelled[id]);
        expected.resize(std::min(expected.size(), a.ids.size()));
      }
      EXPECT_EQ(a.ids, expected) << "request " << id << " choice " << choice;
    }
  }
  EXPECT_LE(static_cast<double>(waited), 2.5 * fair + 30);
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
