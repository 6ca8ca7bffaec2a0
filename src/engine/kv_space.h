// Rows for the keys and values of sequences, in one of three layouts (see KvLayout): who gets which, and what must be
// copied before a step.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "engine/engine_options.h"

namespace mm {

struct RowCopy {  // rows [from, from + count) of every layer to [to, ...), before the step writes
  int32_t from = 0, to = 0, count = 0;
};

// The rows of one sequence.
struct SequenceRows {
  std::vector<int32_t> blocks;       // paged, preallocated: blocks in order. concat: empty
  int64_t start = -1, capacity = 0;  // concat: its run
  int64_t n_row = 0;                 // rows it can use; tokens [0, n_row) have a place
  // Paged: full blocks [0, n_published) are known to the pool, `content` is that of their chain.
  int64_t n_published = 0;
  BlockPool::Content content = 0;
};

// Not thread safe.
class KvSpace {
 public:
  // n_row: rows of the pool. paged: block_size a power of two. preallocated, concat: block_size is the context.
  KvSpace(KvLayout layout, int64_t n_row, int64_t block_size, bool prefix_cache);

  // Makes place for tokens [0, n_tok), where [0, n_kept) hold keys already and [n_kept, n_tok) will be written: rows
  // that another sequence shares are replaced by copies. False, and nothing changed, when there is no room.
  bool grow(SequenceRows& rows, int64_t n_kept, int64_t n_tok, std::vector<RowCopy>& copies);
  // `child` (empty) becomes a second user of the parent's first n_tok tokens. False when there is no room.
  bool fork(const SequenceRows& parent, int64_t n_tok, SequenceRows& child, std::vector<RowCopy>& copies);
  void release(SequenceRows& rows);

  // Gives an empty sequence the longest known run of blocks that holds the beginning of `tokens`, at most limit tokens.
  // Returns how many tokens that is.
  int64_t match(SequenceRows& rows, std::span<const int32_t> tokens, int64_t limit);
  // Tokens [0, n_tok) of the sequence have their keys: its new full blocks may be shared from now on.
  void publish(SequenceRows& rows, std::span<const int32_t> tokens, int64_t n_tok);

  void forget();                          // nothing is known any more; no sequence may hold rows
  int64_t free_rows() const;              // at least so many could be had now
  int64_t rows_for(int64_t n_tok) const;  // that n_tok tokens of a new sequence take
  int32_t row(const SequenceRows& rows, int64_t token) const;
  void append_table(const SequenceRows& rows, std::vector<int32_t>& table) const;  // first rows of its blocks
  int64_t table_entries(int64_t n_tok) const;
  int block_shift() const { return block_shift_; }
  int64_t block_size() const { return block_size_; }
  int64_t n_row() const { return n_row_; }
  const BlockPool* pool() const { return pool_ ? &*pool_ : nullptr; }  // null: concat
  void check() const;

 private:
  std::optional<int64_t> take_run(int64_t n);
  void give_run(int64_t start, int64_t n);

  KvLayout layout_;
  int64_t n_row_, block_size_;
  int block_shift_;
  bool prefix_cache_;
  std::optional<BlockPool> pool_;
  std::map<int64_t, int64_t> runs_;  // concat: free runs, start -> length
};

}  // namespace mm
