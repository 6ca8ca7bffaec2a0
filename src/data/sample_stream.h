// Rows of several files, parsed and tokenized by all cores, handed over in their order.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "data/samples.h"

namespace mm {

struct StreamedRow {
  int64_t file = 0, line = 0;            // index into the paths, line number from 1
  std::string error;                     // not empty: a bad row and why
  std::vector<TokenSequence> sequences;  // empty for a bad row and without tokenizer
};

// Calls sink(row) on the calling thread for every row that is not blank, in order. `tokenizer` may be null: rows are
// then parsed and rendered only. Memory: a few chunks of 256 KiB a thread and their ids, whatever the size of the
// files. Shows a progress bar named `title`. Error for files that cannot be read and for tokenizers that do not suit
// the kind.
void stream_samples(const std::vector<std::string>& paths, const Tokenizer* tokenizer, const SampleOptions& options,
                    const std::string& title, const std::function<void(StreamedRow&)>& sink);

struct BadRow {
  int64_t file = 0, line = 0;
  std::string reason;
  std::string text(const std::vector<std::string>& paths) const;  // "a.jsonl:12: row: expected ..., found ..."
};

// Counts rows and keeps the first bad ones.
struct BadRows {
  static constexpr size_t max_kept = 100;
  int64_t rows = 0, bad = 0;
  std::vector<BadRow> first;
  void add(const StreamedRow& row);
  // Error when there are no good rows at all or more than max_share bad ones; a warning with examples when there are
  // some.
  void judge(const std::vector<std::string>& paths, double max_share) const;
};

}  // namespace mm
