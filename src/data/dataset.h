// Tokenized rows of text or conversations in one mapped file.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/sample_stream.h"
#include "data/samples.h"
#include "text/tokenizer.h"

namespace mm {

// Immutable; copies share the data. Every const method may be called from any thread.
class TokenDataset {
 public:
  // Parses, templates and tokenizes by all cores (kinds pretrain and chat; Error for others), or maps what an earlier
  // run left in `cache_dir`, recognised by a hash of the files' bytes, the tokenizer and the options. A damaged cache
  // is rebuilt with a warning; one that cannot be written is done without, in memory, with a warning. cache_dir "": in
  // memory. Bad rows are left out with a warning; too many of them, or no rows at all, are an Error.
  static TokenDataset build(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                            const SampleOptions& options, const std::string& cache_dir);

  int64_t rows() const;
  int64_t tokens() const;
  int64_t targets() const;
  int64_t truncated() const;  // rows that were cut to max_len (of all files, also after split)
  int64_t max_row_len() const;
  int64_t row_len(int64_t i) const;
  // is_target[t]: token t itself is predicted (MiniMind's labels[t] != -100); is_target[0] is always 0.
  void row(int64_t i, std::vector<int32_t>& ids, std::vector<uint8_t>& is_target) const;
  std::pair<int64_t, int64_t> source(int64_t i) const;  // (index into paths, line number)
  std::string source_text(int64_t i) const;             // "a.jsonl:12"
  const std::vector<std::string>& paths() const;
  const BadRows& bad_rows() const;
  // Of ids, masks, their order and their line numbers: equal for plain and compressed files. Never of options.
  uint64_t fingerprint() const;
  bool from_cache() const;

  // (training, validation): round(share * rows) rows, at least one of each if 0 < share < 1 and there are two, chosen
  // by seed alone; both in the order of the files.
  std::pair<TokenDataset, TokenDataset> split(double valid_share, uint64_t seed) const;

 private:
  struct Store;
  TokenDataset(std::shared_ptr<const Store> store, std::shared_ptr<const std::vector<uint32_t>> subset);
  int64_t stored(int64_t i) const;

  std::shared_ptr<const Store> store_;
  std::shared_ptr<const std::vector<uint32_t>> subset_;  // null: all rows
  int64_t tokens_ = 0, targets_ = 0, max_row_len_ = 0;
  uint64_t fingerprint_ = 0;
};

}  // namespace mm
