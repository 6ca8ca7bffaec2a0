#include "engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "engine/test_model.h"
#include "model/forward.h"
#include "text/bpe_trainer.h"

namespace mm {

namespace {

// Collects what requests are answered, from any thread.
class Answers {
 public:
  struct Answer {
    std::vector<int32_t> ids;
    std::vector<float> logprobs, embedding;
    std::string text, error;
    int n_finished = 0;
    EngineEvent last;
  };
  // The sink of choice 0.. of a request named `name`.
  std::function<void(EngineEvent&&)> sink(int name) {
    return [this, name](EngineEvent&& e) {
      const std::lock_guard lock(mutex_);
      Answer& a = all_[{name, e.choice}];
      a.ids.insert(a.ids.end(), e.ids.begin(), e.ids.end());
      a.logprobs.insert(a.logprobs.end(), e.logprobs.begin(), e.logprobs.end());
      a.text += e.text;
      n_events++;
      if (!e.embedding.empty()) a.embedding = e.embedding;
      if (!e.finished) return;
      a.n_finished++;
      a.last = std::move(e);
      n_finished++;
      changed_.notify_all();
    };
  }
  void wait(int n) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return n_finished >= n; }));
  }
  void wait_events(int n) {
    for (int i = 0; i < 6000 && n_events < n; i++) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ASSERT_GE(n_events, n);
  }
  Answer get(int name, int choice = 0) {
    const std::lock_guard lock(mutex_);
    return all_[{name, choice}];
  }
  std::atomic<int> n_events = 0;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<int, int>, Answer> all_;
  int n_finished = 0;
};

EngineOptions small_options() {
  EngineOptions o;
  o.weights = WeightFormat::f32;
  o.kv = KvFormat::f32;
  o.max_sequences = 8;
  o.kv_tokens = 1024;
  o.step_tokens = 32;
  return o;
}

EngineRequest request(std::vector<int32_t> prompt, int64_t n) {
  EngineRequest r;
  r.prompt = std::move(prompt);
  r.sampling.greedy = true;
  r.max_new_tokens = n;
  return r;
}

TEST(Engine, ManyThreadsSubmitAndAllAreAnswered) {
  const auto model = lively_model(small_config(97), 1);
  Engine engine(*model, std::nullopt, small_options());
  Answers alone, together;
  for (int i = 0; i < 24; i++) {
    auto r = request(some_prompt(3 + i, 97, i), 20);
    r.sink = alone.sink(i);
    ASSERT_EQ(engine.submit(r).status, SubmitStatus::accepted);
    alone.wait(i + 1);
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++) {
    threads.emplace_back([&, t] {
      for (int i = t; i < 24; i += 4) {
        auto r = request(some_prompt(3 + i, 97, i), 20);
        r.sink = together.sink(i);
        EXPECT_EQ(engine.submit(std::move(r)).status, SubmitStatus::accepted);
      }
    });
  }
  for (auto& t : threads) t.join();
  together.wait(24);
  for (int i = 0; i < 24; i++) {
    EXPECT_EQ(together.get(i).ids, alone.get(i).ids) << i;
    EXPECT_EQ(together.get(i).last.finish, FinishReason::length);
    EXPECT_EQ(together.get(i).last.prompt_tokens, 3 + i);
    EXPECT_EQ(together.get(i).last.completion_tokens, 20);
  }
  engine.drain(10);
  const EngineStats s = engine.stats();
  EXPECT_EQ(s.n_submitted, 48);
  EXPECT_EQ(s.n_finished, 48);
  EXPECT_EQ(s.n_block_used, 0);
  EXPECT_EQ(s.generated_tokens, 48 * 20);
}

TEST(Engine, AFullQueueRefusesAndADrainedEngineTakesNothing) {
  const auto model = lively_model(small_config(97), 2);
  EngineOptions o = small_options();
  o.queue_limit = 2;
  o.max_sequences = 1;
  Engine engine(*model, std::nullopt, o);
  Answers answers;
  int accepted = 0, refused = 0;
  for (int i = 0; i < 200; i++) {
    auto r = request(some_prompt(5, 97, i), 80);
    r.sink = answers.sink(i);
    const Submitted s = engine.submit(std::move(r));
    accepted += s.status == SubmitStatus::accepted;
    if (s.status != SubmitStatus::queue_full) continue;
    refused++;
    EXPECT_GE(s.retry_after_seconds, 1.0);
  }
  EXPECT_GT(refused, 0);
  answers.wait(accepted);
  engine.drain(10);
  EXPECT_EQ(engine.submit(request({1, 2}, 2)).status, SubmitStatus::stopping);
  EXPECT_EQ(engine.stats().n_rejected, refused + 1);
  EXPECT_EQ(engine.stats().n_finished, accepted);
}

// A sink that holds the engine's thread at every event until it is let go on.
class Gate {
 public:
  std::function<void(EngineEvent&&)> sink() {
    return [this](EngineEvent&&) {
      std::unique_lock lock(mutex_);
      n_reached_++;
      changed_.notify_all();
      changed_.wait_for(lock, std::chrono::seconds(60), [&] { return open_ || n_let_ >= n_reached_; });
    };
  }
  void wait(int n) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return n_reached_ >= n; }));
  }
  void let_one() {
    const std::lock_guard lock(mutex_);
    n_let_++;
    changed_.notify_all();
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int n_reached_ = 0, n_let_ = 0;
  bool open_ = false;
};

struct QueueCase {
  int64_t max_sequences, queue_limit;
  int n;         // choices of each request
  int accepted;  // beside the one that runs
};

TEST(Engine, OnlyRequestsThatCannotRunFillTheQueue) {
  const auto model = lively_model(small_config(97), 2);
  for (const QueueCase c :
       {QueueCase{1, 2, 1, 2}, QueueCase{8, 1, 1, 8}, QueueCase{8, 4, 1, 11}, QueueCase{8, 2, 3, 4}}) {
    SCOPED_TRACE(fmt::format("{} sequences, queue of {}, {} choices", c.max_sequences, c.queue_limit, c.n));
    EngineOptions o = small_options();
    o.max_sequences = c.max_sequences;
    o.queue_limit = c.queue_limit;
    Answers answers;
    Gate gate;
    Engine engine(*model, std::nullopt, o);
    auto first = request(some_prompt(5, 97), 30);
    first.sink = gate.sink();
    ASSERT_EQ(engine.submit(first).status, SubmitStatus::accepted);
    gate.wait(1);
    gate.let_one();
    gate.wait(2);  // its first step has ended; nothing changes until it is let go on
    int accepted = 0;
    for (int i = 0; i < 30; i++) {
      auto r = request(some_prompt(5, 97, i), 30);
      r.n = c.n;
      r.sink = answers.sink(i);
      accepted += engine.submit(std::move(r)).status == SubmitStatus::accepted;
    }
    EXPECT_EQ(accepted, c.accepted);
    EXPECT_EQ(engine.stats().n_waiting, c.accepted);
    EXPECT_EQ(engine.stats().n_rejected, 30 - c.accepted);
    for (int reached = 3; reached < 6; reached++) {  // on their way into the core, and when those that can run do
      gate.let_one();
      gate.wait(reached);
      auto r = request(some_prompt(5, 97), 3);
      r.n = c.n;
      EXPECT_EQ(engine.submit(std::move(r)).status, SubmitStatus::queue_full) << reached;
    }
    gate.open();
    answers.wait(accepted * c.n);
  }
}

TEST(Engine, AnIdleEngineTakesAsManyAsCanRunAndWaitHoweverManyCameBefore) {
  const auto model = lively_model(small_config(97), 2);
  EngineOptions o = small_options();
  o.queue_limit = 1;
  Engine engine(*model, std::nullopt, o);
  Answers answers;
  for (int round = 0; round < 20; round++) {
    for (int i = 0; i < 9; i++) {
      auto r = request(some_prompt(5, 97, i), 3);
      r.sink = answers.sink(100 * round + i);
      EXPECT_EQ(engine.submit(std::move(r)).status, SubmitStatus::accepted) << round << " " << i;
    }
    answers.wait(9 * (round + 1));
    // The answers leave within their last step; a moment later the engine knows that it is idle.
    for (int i = 0; i < 6000 && engine.stats().n_running > 0; i++)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(engine.stats().n_rejected, 0);
}

TEST(Engine, WhereRowsAreScarceFreeSequencesAreNoPlaces) {
  const auto model = lively_model(small_config(97), 2);
  EngineOptions o = small_options();
  o.kv_tokens = 96;  // of one sequence
  o.queue_limit = 2;
  Answers answers;
  Gate gate;
  Engine engine(*model, std::nullopt, o);
  const auto submit = [&](int name) {
    auto r = request(some_prompt(60, 97, name), 3);
    r.sink = answers.sink(name);
    return engine.submit(std::move(r)).status;
  };
  auto first = request(some_prompt(60, 97, 50), 30);
  first.sink = gate.sink();
  ASSERT_EQ(engine.submit(first).status, SubmitStatus::accepted);
  gate.wait(1);
  int accepted = 0;
  for (int i = 0; i < 3; i++) accepted += submit(i) == SubmitStatus::accepted;
  EXPECT_EQ(accepted, 3);  // who comes between two steps is not asked for rows yet
  gate.let_one();
  gate.wait(2);
  gate.let_one();
  gate.wait(3);  // a whole step has ended since: all three wait for rows
  for (int i = 20; i < 40; i++) EXPECT_EQ(submit(i), SubmitStatus::queue_full);
  EXPECT_EQ(engine.stats().n_waiting, 3);
  gate.open();
  answers.wait(accepted);
}

TEST(Engine, CancelDeadlineAndTheEndOfTheEngine) {
  ModelConfig config = small_config(97);
  config.max_position_embeddings = 4096;
  const auto model = lively_model(config, 3);
  Answers answers;
  {
    EngineOptions o = small_options();
    o.kv_tokens = 8 * 4096;
    Engine engine(*model, std::nullopt, o);
    auto r = request(some_prompt(5, 97), 4000);
    r.sink = answers.sink(0);
    const uint64_t id = engine.submit(r).id;
    r.deadline_seconds = 0.05;
    r.sink = answers.sink(1);
    engine.submit(r);
    r.deadline_seconds = 0;
    r.n = 3;
    r.sink = answers.sink(2);
    engine.submit(r);
    answers.wait_events(20);
    engine.cancel(id);
    engine.cancel(12345);
    answers.wait(2);
    EXPECT_EQ(answers.get(0).last.finish, FinishReason::cancelled);
    EXPECT_EQ(answers.get(1).last.finish, FinishReason::timeout);
    EXPECT_EQ(answers.get(0).n_finished, 1);
    const BlockMap map = engine.block_map();
    EXPECT_EQ(map.n_block, 8 * 4096 / 16);
    EXPECT_FALSE(map.owners.empty());
  }
  for (int choice = 0; choice < 3; choice++) EXPECT_EQ(answers.get(2, choice).last.finish, FinishReason::cancelled);
}

TEST(Engine, EmbeddingsAreTheMeanOfTheFinalHiddenStates) {
  const auto model = lively_model(small_config(97), 4);
  EngineOptions o = small_options();
  o.step_tokens = 7;  // several chunks
  Engine engine(*model, std::nullopt, o);
  Answers answers;
  auto r = request(some_prompt(40, 97), 1);
  r.embed = true;
  r.sink = answers.sink(0);
  engine.submit(r);
  auto text = request(some_prompt(30, 97, 3), 10);
  text.sink = answers.sink(1);
  engine.submit(text);
  answers.wait(2);
  Activations acts(model->config, 40, false);
  TokenBatch batch;
  batch.clear();
  batch.ids = r.prompt;
  for (int32_t i = 0; i < 40; i++) batch.positions.push_back(i);
  batch.cu_seqlens = {0, 40};
  forward({}, *model, batch, acts);
  const auto d = static_cast<size_t>(model->config.hidden_size);
  std::vector<double> mean(d);
  double norm = 0;
  for (size_t i = 0; i < d; i++) {
    for (size_t t = 0; t < 40; t++) mean[i] += static_cast<double>(acts.h.f32()[t * d + i]);
    norm += mean[i] * mean[i];
  }
  const auto embedding = answers.get(0).embedding;
  ASSERT_EQ(embedding.size(), d);
  for (size_t i = 0; i < d; i++) EXPECT_NEAR(static_cast<double>(embedding[i]), mean[i] / std::sqrt(norm), 1e-4);
  EXPECT_EQ(answers.get(1).ids.size(), 10u);
}

TEST(Engine, BatchInvariantModeGivesTheSameBitsAloneAndAmongSixtyFour) {
  ModelConfig config = small_config(101);
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.head_dim = 16;
  const auto model = lively_model(config, 5);
  for (const WeightFormat weights : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::i8}) {
    SCOPED_TRACE(weight_format_name(weights));
    EngineOptions o = small_options();
    o.weights = weights;
    o.kv = weights == WeightFormat::f32 ? KvFormat::f32 : KvFormat::bf16;
    o.max_sequences = 64;
    o.kv_tokens = 64 * 96;
    o.step_tokens = 96;
    o.batch_invariant = true;
    Engine engine(*model, std::nullopt, o);
    EngineRequest wanted = request(some_prompt(37, 101, 7), 30);
    wanted.sampling.greedy = false;
    wanted.sampling.temperature = 1.0f;
    wanted.sampling.seed = 9;
    wanted.logprobs = 0;
    Answers answers;
    wanted.sink = answers.sink(-1);
    engine.submit(wanted);
    answers.wait(1);
    for (int i = 0; i < 63; i++) {
      auto r = request(some_prompt(2 + i % 40, 101, i), 10 + i % 37);
      r.sink = answers.sink(i);
      engine.submit(std::move(r));
      if (i != 31) continue;
      wanted.sink = answers.sink(-2);
      engine.submit(wanted);
    }
    answers.wait(65);
    EXPECT_EQ(answers.get(-2).ids, answers.get(-1).ids);
    EXPECT_EQ(answers.get(-2).logprobs, answers.get(-1).logprobs);  // bit for bit
    EXPECT_EQ(answers.get(-1).logprobs.size(), 30u);
  }
}

TEST(Engine, EveryLayoutOfTheCacheGivesTheSameTokens) {
  const auto model = lively_model(small_config(97), 6);
  std::vector<std::vector<int32_t>> first;
  for (const KvLayout layout : {KvLayout::paged, KvLayout::preallocated, KvLayout::concat}) {
    for (const bool fixed : {false, true}) {
      EngineOptions o = small_options();
      o.kv_layout = layout;
      o.static_batch = fixed;
      o.warm_up = fixed;  // leaves nothing behind
      Engine engine(*model, std::nullopt, o);
      Answers answers;
      for (int i = 0; i < 12; i++) {
        auto r = request(some_prompt(3 + 2 * i, 97, i), 15);
        r.n = i % 3 == 0 ? 2 : 1;
        r.sink = answers.sink(i);
        engine.submit(std::move(r));
      }
      answers.wait(16);
      for (int i = 0; i < 12; i++) {
        const auto ids = answers.get(i).ids;
        if (static_cast<int>(first.size()) == i) first.push_back(ids);
        EXPECT_EQ(ids, first[static_cast<size_t>(i)]) << kv_layout_name(layout) << " " << fixed << " " << i;
      }
    }
  }
}

TEST(Engine, BiasesPenaltiesAndSeedsReachTheDraw) {
  const auto model = lively_model(small_config(97), 7);
  Engine engine(*model, std::nullopt, small_options());
  Answers answers;
  auto r = request(some_prompt(9, 97), 12);
  r.logit_bias = {{42, 900.0f}};
  r.sink = answers.sink(0);
  engine.submit(r);
  r.sampling.presence_penalty = 100;  // outweighs nothing: the bias is larger
  r.sink = answers.sink(1);
  engine.submit(r);
  r.logit_bias = {{42, 50.0f}};
  r.sink = answers.sink(2);
  engine.submit(r);
  answers.wait(3);
  EXPECT_EQ(answers.get(0).ids, std::vector<int32_t>(12, 42));
  EXPECT_EQ(answers.get(1).ids, std::vector<int32_t>(12, 42));
  auto ids = answers.get(2).ids;  // each token at most once while others are left
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::unique(ids.begin(), ids.end()), ids.end());
}

TEST(Engine, OptionsThatMakeNoSenseAreErrors) {
  const auto model = lively_model(small_config(97), 8);
  const auto bad = [&](auto change) {
    EngineOptions o = small_options();
    change(o);
    EXPECT_THROW(Engine(*model, std::nullopt, o), Error);
  };
  bad([](auto& o) { o.context = 97; });
  bad([](auto& o) { o.max_sequences = 0; });
  bad([](auto& o) { o.block_size = 12; });
  bad([](auto& o) { o.kv_tokens = 16; });
  bad([](auto& o) { o.weights = WeightFormat::f16; });
  bad([](auto& o) { o.draft_tokens = 4; });
  bad([](auto& o) { o.ngram_draft = 17; });
}

}  // namespace

}  // namespace mm
