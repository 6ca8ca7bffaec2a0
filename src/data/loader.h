// Batches for training, made ahead on one background thread, and batches for evaluation.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/json.h"
#include "data/dataset.h"
#include "data/pack.h"
#include "tensor/token_batch.h"

namespace mm {

// A place in the endless sequence of batches.
struct LoaderCursor {
  int64_t epoch = 0, index = 0;  // index: batches of this epoch already given
  uint64_t plan = 0;             // hash of data and options that the place belongs to; 0: of any
  ordered_json to_json() const;
  static LoaderCursor from_json(const ordered_json& j, const std::string& where);
  bool operator==(const LoaderCursor&) const = default;
};

// Endless batches of the data set's rows, every row exactly once an epoch. The sequence is a function of data and
// options alone. Packed: whole rows one after the other, each its own sequence. Padded: batch_size sequences of seq_len
// tokens with pad_id behind each row, where there is neither target nor weight. The last batch of an epoch may be
// smaller. targets[t] = ids[t + 1] where that is a target of the same row, else -1; loss_weight is 1 or 0; sample[s] =
// row index. One consumer thread.
class BatchLoader {
 public:
  // Error for an empty data set and for rows longer than seq_len.
  BatchLoader(const TokenDataset& data, const LoaderOptions& options);
  ~BatchLoader();
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  void next(TokenBatch& batch);
  LoaderCursor cursor() const;  // the place of the batch that the following next() gives
  // The following next() gives the batch at that place, equal bit for bit. Error if the cursor belongs to other data or
  // options, or lies outside the epoch.
  void seek(const LoaderCursor& cursor);
  int64_t batches_per_epoch() const;              // exact for epoch 0; epochs of packed data may differ by a few
  int64_t batches_in_epoch(int64_t epoch) const;  // exact; takes a planning pass over the rows (about 0.1 us a row)
  int64_t epoch_of_last() const;                  // of the batch that next() gave last; 0 before

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Rows in their order, each alone in its sequence, grouped into batches of at most `max_tokens` (a longer row comes
// alone). Same targets and weights as BatchLoader. One thread.
class SequentialBatches {
 public:
  SequentialBatches(const TokenDataset& data, int64_t max_tokens) : data_(data), max_tokens_(max_tokens) {}
  bool next(TokenBatch& batch);  // false at the end

 private:
  TokenDataset data_;
  int64_t max_tokens_, at_ = 0;
};

// Appends one row as a sequence, with `pad_to` - length pads behind it (none if pad_to is smaller).
void append_row(const TokenDataset& data, int64_t row, int64_t pad_to, int32_t pad_id, TokenBatch& batch);

}  // namespace mm
