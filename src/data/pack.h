// Which rows make up each batch of an epoch: a pure function of the row lengths, the options and the epoch number.
#pragma once

#include <cstdint>
#include <vector>

namespace mm {

struct LoaderOptions {
  int64_t batch_size = 32, seq_len = 512;
  bool packed = true, shuffle = true;
  uint64_t seed = 42;
  int32_t pad_id = 0;  // padded mode only
};

struct EpochPlan {
  std::vector<uint32_t> rows;        // every row exactly once, in training order
  std::vector<int64_t> batch_begin;  // batch b takes rows [batch_begin[b], batch_begin[b + 1])
  int64_t batches() const { return static_cast<int64_t>(batch_begin.size()) - 1; }
};

// packed: whole rows, at most batch_size * seq_len tokens a batch. Rows come in shuffled order; what is left at the end
// of a batch is filled with the longest rows that fit out of the next pack_window ones, so little is lost. The oldest
// waiting row always opens the next batch. padded: batch_size rows a batch. The last batch of an epoch may be smaller.
inline constexpr int64_t pack_window = 1024;
EpochPlan plan_epoch(const std::vector<int32_t>& row_len, const LoaderOptions& options, int64_t epoch);

}  // namespace mm
