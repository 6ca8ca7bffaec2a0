// A runner without a model, for tests of the engine's bookkeeping.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "engine/request.h"
#include "engine/runner.h"

namespace mm {

constexpr int64_t fake_vocab = 101;

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
    return static_cast<int32_t>(u % fake_vocab);
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
      result.ids.push_back(wrong ? (id + 1) % static_cast<int32_t>(fake_vocab) : id);
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
inline std::vector<int32_t> expected_text(const EngineRequest& r, int choice, int64_t context) {
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

}  // namespace mm
