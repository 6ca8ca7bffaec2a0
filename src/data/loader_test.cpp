#include "data/loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "data/test_data.h"

namespace mm {
namespace {

std::vector<int32_t> random_lengths(size_t n, int32_t longest, uint64_t seed) {
  Rng rng{seed, 1, 0};
  std::vector<int32_t> out(n);
  for (auto& x : out) x = 2 + static_cast<int32_t>(rng.below(static_cast<uint64_t>(longest - 1)));
  return out;
}

TEST(Pack, EveryRowOnceWithinTheBudget) {
  for (const size_t n : {1u, 2u, 31u, 1000u, 5000u}) {
    for (const bool shuffle : {false, true}) {
      LoaderOptions o{4, 128, true, shuffle, 9, 0};
      const auto len = random_lengths(n, 128, n);
      const EpochPlan plan = plan_epoch(len, o, 3);
      std::vector<uint32_t> rows = plan.rows;
      std::sort(rows.begin(), rows.end());
      ASSERT_EQ(rows.size(), n);
      for (size_t i = 0; i < n; i++) ASSERT_EQ(rows[i], i);
      EXPECT_EQ(plan.batch_begin.front(), 0);
      EXPECT_EQ(plan.batch_begin.back(), static_cast<int64_t>(n));
      for (int64_t b = 0; b < plan.batches(); b++) {
        const auto begin = plan.rows.begin() + plan.batch_begin[static_cast<size_t>(b)];
        const auto end = plan.rows.begin() + plan.batch_begin[static_cast<size_t>(b) + 1];
        ASSERT_LT(begin, end);
        int64_t tokens = 0;
        for (auto i = begin; i < end; ++i) tokens += len[*i];
        EXPECT_LE(tokens, 4 * 128);
      }
    }
  }
}

TEST(Pack, LittleIsLost) {
  const auto len = random_lengths(20000, 512, 5);
  const LoaderOptions o{8, 512, true, true, 1, 0};
  const EpochPlan plan = plan_epoch(len, o, 0);
  const int64_t tokens = std::accumulate(len.begin(), len.end(), int64_t{0});
  const int64_t ideal = (tokens + 8 * 512 - 1) / (8 * 512);
  EXPECT_LE(plan.batches(), ideal + ideal / 500 + 2);  // 0.2%, and the end of the epoch
}

TEST(Pack, OrderDependsOnSeedAndEpoch) {
  const auto len = random_lengths(500, 64, 5);
  LoaderOptions o{4, 64, true, true, 1, 0};
  const auto rows = plan_epoch(len, o, 0).rows;
  EXPECT_EQ(plan_epoch(len, o, 0).rows, rows);
  EXPECT_NE(plan_epoch(len, o, 1).rows, rows);
  o.seed = 2;
  EXPECT_NE(plan_epoch(len, o, 0).rows, rows);
  // Unshuffled padded batches are the rows as they come.
  o.shuffle = o.packed = false;
  const EpochPlan plain = plan_epoch(len, o, 7);
  for (size_t i = 0; i < plain.rows.size(); i++) EXPECT_EQ(plain.rows[i], i);
  EXPECT_EQ(plain.batches(), 125);
}

// The oldest row opens each batch, so a row waits at most pack_window batches once it is in the window.
TEST(Pack, NoRowStarves) {
  auto len = random_lengths(30000, 64, 5);
  for (size_t i = 0; i < len.size(); i += 7) len[i] = 512;  // never the ones that fill a rest
  const EpochPlan plan = plan_epoch(len, {1, 512, true, false, 1, 0}, 0);
  int64_t longest = 0;
  for (int64_t b = 0; b < plan.batches(); b++) {
    for (int64_t i = plan.batch_begin[static_cast<size_t>(b)]; i < plan.batch_begin[static_cast<size_t>(b) + 1]; i++) {
      const int64_t place = plan.rows[static_cast<size_t>(i)];
      const auto first = std::upper_bound(plan.batch_begin.begin(), plan.batch_begin.end(), place - pack_window);
      const int64_t entered = first - plan.batch_begin.begin();
      longest = std::max(longest, b - entered);
    }
  }
  EXPECT_GT(longest, 100);  // the case is a hard one
  EXPECT_LE(longest, pack_window);
}

class LoaderTest : public ::testing::Test, public ScratchDir {
 protected:
  TokenDataset data(int rows, int64_t max_len = 48) const {
    std::string text;
    Rng rng{3, 3, 0};
    for (int i = 0; i < rows; i++) {
      text +=
          fmt::format(
              R"({{"conversations": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "{}"}}]}})",
              i, std::string(1 + rng.below(40), static_cast<char>('a' + i % 26))) +
          "\n";
    }
    const std::string file = write("c.jsonl", text);
    SampleOptions o;
    o.kind = SampleKind::chat;
    o.max_len = max_len;
    o.empty_think_ratio = o.system_ratio = 0;
    return TokenDataset::build({file}, tiny_tokenizer(), o, "");
  }
};

bool same(const TokenBatch& a, const TokenBatch& b) {
  return a.ids == b.ids && a.positions == b.positions && a.cu_seqlens == b.cu_seqlens && a.targets == b.targets &&
         a.loss_weight == b.loss_weight && a.sample == b.sample;
}

void check_batch(const TokenDataset& d, const LoaderOptions& o, const TokenBatch& b) {
  ASSERT_EQ(b.cu_seqlens.front(), 0);
  ASSERT_EQ(b.cu_seqlens.back(), b.n_tok());
  ASSERT_EQ(b.sample.size(), static_cast<size_t>(b.n_seq()));
  ASSERT_LE(b.n_tok(), o.batch_size * o.seq_len);
  std::vector<int32_t> ids;
  std::vector<uint8_t> is_target;
  for (int64_t s = 0; s < b.n_seq(); s++) {
    d.row(b.sample[static_cast<size_t>(s)], ids, is_target);
    const size_t begin = static_cast<size_t>(b.cu_seqlens[static_cast<size_t>(s)]);
    const size_t n = static_cast<size_t>(b.cu_seqlens[static_cast<size_t>(s) + 1]) - begin;
    ASSERT_EQ(n, o.packed ? ids.size() : static_cast<size_t>(o.seq_len));
    for (size_t t = 0; t < n; t++) {
      const bool wanted = t + 1 < ids.size() && is_target[t + 1] != 0;
      ASSERT_EQ(b.ids[begin + t], t < ids.size() ? ids[t] : o.pad_id);
      ASSERT_EQ(b.positions[begin + t], static_cast<int32_t>(t));
      ASSERT_EQ(b.targets[begin + t], wanted ? ids[t + 1] : -1);
      ASSERT_EQ(b.loss_weight[begin + t], wanted ? 1.0f : 0.0f);
    }
  }
}

TEST_F(LoaderTest, EveryRowOnceAnEpochPackedAndPadded) {
  const TokenDataset d = data(700);
  for (const bool packed : {true, false}) {
    const LoaderOptions o{5, 64, packed, true, 11, 77};
    BatchLoader loader(d, o);
    TokenBatch b;
    for (int64_t epoch = 0; epoch < 3; epoch++) {
      std::vector<int> seen(700, 0);
      int64_t targets = 0;
      EXPECT_EQ(loader.cursor().epoch, epoch);
      const int64_t batches = loader.batches_in_epoch(epoch);
      if (epoch == 0) {
        EXPECT_EQ(loader.batches_per_epoch(), batches);
      }
      for (int64_t i = 0; i < batches; i++) {
        EXPECT_EQ(loader.cursor().index, i);
        loader.next(b);
        EXPECT_EQ(loader.epoch_of_last(), epoch);
        check_batch(d, o, b);
        for (const int64_t row : b.sample) seen[static_cast<size_t>(row)]++;
        targets += std::count_if(b.targets.begin(), b.targets.end(), [](int32_t t) { return t >= 0; });
      }
      EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 700);
      EXPECT_EQ(targets, d.targets());
    }
  }
}

TEST_F(LoaderTest, SeekReproducesTheStream) {
  const TokenDataset d = data(300);
  const LoaderOptions o{3, 64, true, true, 5, 0};
  BatchLoader loader(d, o);
  std::vector<TokenBatch> batches(3 * static_cast<size_t>(loader.batches_per_epoch()));
  std::vector<LoaderCursor> places;
  for (auto& b : batches) {
    places.push_back(loader.cursor());
    loader.next(b);
  }
  TokenBatch b;
  for (const size_t at : {size_t{0}, size_t{1}, batches.size() / 2, batches.size() - 2}) {
    const auto saved = places[at].to_json();
    const LoaderCursor c = LoaderCursor::from_json(parse_json(saved.dump(), "cursor"), "cursor");
    EXPECT_EQ(c, places[at]);
    BatchLoader fresh(d, o);
    for (BatchLoader* l : {&fresh, &loader}) {
      l->seek(c);
      EXPECT_EQ(l->cursor(), c);
      for (size_t i = at; i < std::min(at + 4, batches.size()); i++) {
        l->next(b);
        EXPECT_TRUE(same(b, batches[i])) << i;
      }
    }
  }
}

TEST_F(LoaderTest, CursorsOfOtherDataAreErrors) {
  const TokenDataset d = data(50);
  BatchLoader loader(d, {3, 64, true, true, 5, 0});
  BatchLoader other(d, {3, 64, true, true, 6, 0});
  TokenBatch b;
  loader.next(b);
  EXPECT_THROW(other.seek(loader.cursor()), Error);
  EXPECT_THROW(loader.seek({0, loader.batches_per_epoch(), 0}), Error);
  const LoaderCursor here = loader.cursor();
  loader.next(b);
  TokenBatch again;
  loader.seek(here);
  loader.next(again);
  EXPECT_TRUE(same(b, again));
  EXPECT_THROW(LoaderCursor::from_json(parse_json("{}", "c"), "c"), Error);
  EXPECT_THROW(LoaderCursor::from_json(parse_json(R"({"epoch": -1, "index": 0, "plan": "0"})", "c"), "c"), Error);
  EXPECT_THROW(LoaderCursor::from_json(parse_json(R"({"epoch": 0, "index": 0, "plan": "xyz"})", "c"), "c"), Error);
}

TEST_F(LoaderTest, BadOptionsAreErrors) {
  const TokenDataset d = data(20, 64);
  EXPECT_THROW(BatchLoader(d, {4, 8, true, true, 1, 0}), Error);  // rows longer than seq_len
  EXPECT_THROW(BatchLoader(d, {0, 64, true, true, 1, 0}), Error);
  EXPECT_THROW(BatchLoader(d, {1 << 20, 1 << 20, true, true, 1, 0}), Error);
  EXPECT_THROW(BatchLoader(d.split(0, 1).second, {4, 64, true, true, 1, 0}), Error);
}

TEST_F(LoaderTest, MoreRoomThanRows) {
  const TokenDataset d = data(3);
  BatchLoader loader(d, {64, 64, true, true, 1, 0});
  TokenBatch b;
  for (int64_t epoch = 0; epoch < 20; epoch++) {
    loader.next(b);
    EXPECT_EQ(b.n_seq(), 3);
    EXPECT_EQ(loader.epoch_of_last(), epoch);
  }
}

TEST_F(LoaderTest, SequentialGivesRowsInOrder) {
  const TokenDataset d = data(100);
  for (const int64_t limit : {1, 60, 500, 1 << 20}) {
    SequentialBatches batches(d, limit);
    TokenBatch b;
    int64_t row = 0, targets = 0;
    while (batches.next(b)) {
      EXPECT_TRUE(b.n_tok() <= limit || b.n_seq() == 1);
      for (const int64_t s : b.sample) EXPECT_EQ(s, row++);
      targets += std::count_if(b.targets.begin(), b.targets.end(), [](int32_t t) { return t >= 0; });
    }
    EXPECT_EQ(row, 100);
    EXPECT_EQ(targets, d.targets());
  }
}

}  // namespace
}  // namespace mm
