// Who goes first, and how long anybody waits at most: the policy that scheduler.h states, under a fake runner and a
// clock of the test's own.
#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include "engine/engine_core.h"
#include "engine/fake_runner.h"

namespace mm {

namespace {

struct Machine {
  int64_t max_sequences = 2, step_tokens = 16, n_row = 1024, context = 256;
  double step_seconds = 0.01;
  int depth = 1;
};

struct Ask {
  std::string client = "";
  int priority = 0;
  int64_t n_prompt = 4, n_new = 4;
  double deadline_seconds = 0;
};

struct Seen {
  Ask ask;
  int64_t sent_at = 0, first_at = -1, ended_at = -1;  // steps
  int64_t n_tokens = 0;
  FinishReason finish = FinishReason::error;
};

// An engine that is asked, stepped and watched.
class Office {
 public:
  explicit Office(const Machine& m) : seconds_(m.step_seconds) {
    EngineCore::Setup setup;
    setup.options.block_size = 4;
    setup.options.max_sequences = m.max_sequences;
    setup.options.prefix_cache = false;
    setup.limits = {
        .n_row = m.n_row, .max_tok = m.step_tokens, .max_seq = m.max_sequences, .max_out = 16, .context = m.context};
    setup.n_vocab = fake_vocab;
    core_ = std::make_unique<EngineCore>(setup, std::make_unique<FakeRunner>(m.n_row, m.depth), std::nullopt);
  }
  size_t ask(const Ask& a) {
    const size_t name = seen.size();
    seen.push_back({.ask = a, .sent_at = at});
    EngineRequest r;
    for (int64_t i = 0; i < a.n_prompt; i++) r.prompt.push_back(static_cast<int32_t>((7 * i + 3) % fake_vocab));
    r.stream = name;
    r.max_new_tokens = a.n_new;
    r.priority = a.priority;
    r.client = a.client;
    r.deadline_seconds = a.deadline_seconds;
    r.sink = [this, name](EngineEvent&& e) {
      Seen& s = seen[name];
      s.n_tokens += static_cast<int64_t>(e.ids.size());
      if (s.first_at < 0 && !e.ids.empty()) {
        order.push_back(name);
        s.first_at = at;
      }
      if (!e.finished) return;
      s.ended_at = at;
      s.finish = e.finish;
    };
    core_->add(name + 1, std::move(r), now());
    return name;
  }
  void step() {
    at++;
    ASSERT_TRUE(core_->step(now()));
    core_->check_invariants();
  }
  void finish() {
    for (int i = 0; i < 100000 && !core_->idle(); i++) step();
    ASSERT_TRUE(core_->idle());
  }
  double now() const { return 1 + static_cast<double>(at) * seconds_; }
  EngineStats stats() const { return core_->stats(); }
  // Requests that `which` chooses and that got their first token before `name` did.
  int64_t before(size_t name, const std::function<bool(const Seen&)>& which) const {
    int64_t n = 0;
    for (const size_t other : order) {
      if (other == name) break;
      n += which(seen[other]);
    }
    return n;
  }
  std::vector<Seen> seen;
  std::vector<size_t> order;  // of first tokens
  int64_t at = 0;

 private:
  double seconds_;
  std::unique_ptr<EngineCore> core_;
};

TEST(Scheduler, AClientThatCameLaterTakesTurnsWithAFloodHoweverOldThatIs) {
  for (const double step_seconds : {0.01, 1.0, 30.0}) {
    SCOPED_TRACE(fmt::format("{} s a step", step_seconds));
    Office office({.step_seconds = step_seconds});
    for (int i = 0; i < 50; i++) office.ask({.client = "a"});
    for (int i = 0; i < 20; i++) office.step();
    std::vector<size_t> late;
    for (int i = 0; i < 5; i++) late.push_back(office.ask({.client = "b"}));
    const int64_t of_a = static_cast<int64_t>(office.order.size());
    office.finish();
    // Two places: at most two of A's are let in for each of B's.
    for (size_t i = 0; i < late.size(); i++)
      EXPECT_LE(office.before(late[i], [](const Seen& s) { return s.ask.client == "a"; }) - of_a,
                2 * (static_cast<int64_t>(i) + 1));
    // And B's are not before all of A's either.
    EXPECT_GE(office.before(late[4], [](const Seen& s) { return s.ask.client == "a"; }) - of_a, 3);
  }
}

TEST(Scheduler, AHigherPriorityWaitsBehindNothingLowerThatOnlyWaits) {
  Office office({});
  for (int i = 0; i < 30; i++) office.ask({.client = fmt::format("{}", i % 3), .priority = i % 2});
  for (int i = 0; i < 6; i++) office.step();
  const std::vector<size_t> running = office.order;
  const size_t high = office.ask({.client = "0", .priority = 2});
  office.finish();
  EXPECT_EQ(office.before(high, [](const Seen&) { return true; }), static_cast<int64_t>(running.size()));
  // Of those that came together all of the higher priority went first, but for the two that found free places.
  const auto low_before = [&](size_t i) { return office.before(i, [](const Seen& s) { return s.ask.priority == 0; }); };
  for (size_t i = 0; i < 30; i++) {
    if (office.seen[i].ask.priority == 1) {
      EXPECT_EQ(low_before(i), 0) << i;
    }
  }
}

// Keeps `deep` requests of each kind waiting, as long as it is asked to.
struct Supply {
  std::vector<Ask> kinds;
  size_t deep = 3;
  std::vector<size_t> asked = {};
  void keep_up(Office& office) {
    for (const Ask& kind : kinds) {
      size_t n = 0;
      for (const size_t name : asked) {
        const Seen& s = office.seen[name];
        n += s.first_at < 0 && s.ask.client == kind.client && s.ask.priority == kind.priority;
      }
      for (; n < deep; n++) asked.push_back(office.ask(kind));
    }
    std::erase_if(asked, [&](size_t name) { return office.seen[name].first_at >= 0; });
  }
};

TEST(Scheduler, NoSupplyOfHigherPrioritiesAndOtherClientsStarvesARequest) {
  for (const int priority : {0, 1, 3}) {
    for (const int depth : {1, 2}) {
      SCOPED_TRACE(fmt::format("priority {} under 3, depth {}", priority, depth));
      Office office({.step_seconds = 0.5, .depth = depth});
      Supply supply{{{.client = "a", .priority = 3}, {.client = "b", .priority = 3}, {.client = "low", .priority = 3}}};
      for (int i = 0; i < 50; i++) {
        supply.keep_up(office);
        office.step();
      }
      const size_t low = office.ask({.client = "low", .priority = priority});
      for (int i = 0; i < 1000 && office.seen[low].first_at < 0; i++) {
        supply.keep_up(office);
        office.step();
      }
      ASSERT_GE(office.seen[low].first_at, 0) << "starved";
      // scheduler.h: nobody who comes 10 s for each priority and once more later. The nine that wait then may go first,
      // by two places of 4 steps each, behind those that run; then its own step.
      const double seconds = 0.5 * static_cast<double>(office.seen[low].first_at - office.seen[low].sent_at);
      EXPECT_LE(seconds, 10.0 * (3 - priority + 1) + 0.5 * static_cast<double>(4 * 6 + 1 + depth));
      if (priority < 2) {
        EXPECT_GE(seconds, 10.0 * (3 - priority - 1)) << "priorities mean something";
      }
    }
  }
}

TEST(Scheduler, ClientsThatComeOnlyOnceDoNotStarveOneThatGotMuch) {
  Office office({.step_seconds = 0.5});
  std::vector<size_t> once;
  const auto step = [&] {
    std::erase_if(once, [&](size_t name) { return office.seen[name].first_at >= 0; });
    while (once.size() < 3) once.push_back(office.ask({.client = fmt::format("once {}", office.seen.size())}));
    office.step();
  };
  office.ask({.client = "much", .n_new = 200});
  for (int i = 0; i < 100; i++) step();
  const size_t next = office.ask({.client = "much"});
  for (int i = 0; i < 1000 && office.seen[next].first_at < 0; i++) step();
  ASSERT_GE(office.seen[next].first_at, 0) << "starved";
  // scheduler.h: 10 s, then each other client once; three wait and one runs, 4 steps each.
  const double seconds = 0.5 * static_cast<double>(office.seen[next].first_at - office.seen[next].sent_at);
  EXPECT_LE(seconds, 10 + 0.5 * (4 * 4 + 2));
  EXPECT_GE(seconds, 5) << "tokens count";
}

TEST(Scheduler, WhatWasPutBackIsNotStarvedByNewcomers) {
  // Rows for one long text and little more: of two that grow the later one is put back.
  Office office({.max_sequences = 4, .n_row = 128, .context = 128, .step_seconds = 0.5});
  const size_t first = office.ask({.client = "a", .n_prompt = 30, .n_new = 80});
  const size_t second = office.ask({.client = "b", .n_prompt = 30, .n_new = 60});
  Supply supply{{{.client = "c", .n_prompt = 8, .n_new = 12}, {.client = "d", .n_prompt = 8, .n_new = 12}}};
  for (int i = 0; i < 2000 && office.seen[second].ended_at < 0; i++) {
    supply.keep_up(office);
    office.step();
  }
  EXPECT_GT(office.stats().n_preempted, 0);
  ASSERT_GE(office.seen[second].ended_at, 0) << "starved";
  EXPECT_EQ(office.seen[first].n_tokens, 80);
  // The first one never waits; the second goes on when that one has ended, and the newcomers of 10 s, 20 steps.
  EXPECT_LE(office.seen[first].ended_at, 80 + 4);
  EXPECT_LE(office.seen[second].ended_at, office.seen[first].ended_at + 60 + 20 + 12);
}

TEST(Scheduler, DeadlinesEndWhatWaitsAndWhatRunsAndCostTheOthersNothing) {
  Office office({.step_seconds = 1});
  for (int i = 0; i < 2; i++) office.ask({.client = "long", .n_new = 60, .deadline_seconds = 30});
  office.step();
  std::vector<size_t> hasty, patient;
  for (int i = 0; i < 20; i++) {
    hasty.push_back(office.ask({.client = "hasty", .deadline_seconds = 10}));
    patient.push_back(office.ask({.client = "patient"}));
  }
  office.finish();
  for (size_t i = 0; i < 2; i++) {
    EXPECT_EQ(office.seen[i].finish, FinishReason::timeout);
    EXPECT_EQ(office.seen[i].ended_at, 31);
  }
  for (const size_t name : hasty) {
    EXPECT_EQ(office.seen[name].finish, FinishReason::timeout);
    EXPECT_EQ(office.seen[name].ended_at, 12);
  }
  for (size_t i = 0; i < patient.size(); i++) {
    EXPECT_EQ(office.seen[patient[i]].finish, FinishReason::length);
    EXPECT_EQ(office.seen[patient[i]].first_at, 31 + 4 * static_cast<int64_t>(i / 2)) << i;
  }
}

TEST(Scheduler, ALongPromptStallsNoDecodeAndShortPromptsDoNotStallIt) {
  for (const int depth : {1, 2}) {
    Office office({.max_sequences = 6, .step_tokens = 12, .context = 250, .step_seconds = 0.01, .depth = depth});
    std::vector<size_t> running;
    for (int i = 0; i < 3; i++) running.push_back(office.ask({.client = "r", .n_new = 150}));
    while (office.seen[running[2]].first_at < 0) office.step();
    const size_t prompt = office.ask({.client = "p", .n_prompt = 200});
    office.step();
    Supply supply{{{.client = "s", .n_prompt = 8, .n_new = 1}, {.client = "t", .n_prompt = 8, .n_new = 1}}};
    while (office.seen[prompt].first_at < 0 && office.at < 150) {
      supply.keep_up(office);
      std::vector<int64_t> had;
      for (const size_t name : running) had.push_back(office.seen[name].n_tokens);
      office.step();
      for (size_t i = 0; i < 3; i++) EXPECT_EQ(office.seen[running[i]].n_tokens, had[i] + 1) << office.at;
    }
    // Nine tokens of each step are left to prompts, and the oldest has them.
    ASSERT_GE(office.seen[prompt].first_at, 0) << "stalled";
    EXPECT_LE(office.seen[prompt].first_at - office.seen[prompt].sent_at, (200 + 8) / 9 + 2 + 2 * depth);
  }
}

}  // namespace

}  // namespace mm
