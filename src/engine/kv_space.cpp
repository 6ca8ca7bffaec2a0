#include "engine/kv_space.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace mm {

static int shift_for(int64_t block_size) { return std::bit_width(static_cast<uint64_t>(block_size - 1)); }

KvSpace::KvSpace(KvLayout layout, int64_t n_row, int64_t block_size, bool prefix_cache)
    : layout_(layout),
      n_row_(n_row),
      block_size_(block_size),
      block_shift_(shift_for(block_size)),
      prefix_cache_(prefix_cache && layout == KvLayout::paged) {
  MM_CHECK(n_row >= block_size && n_row <= INT32_MAX);
  MM_CHECK(layout != KvLayout::paged || std::has_single_bit(static_cast<uint64_t>(block_size)));
  if (layout == KvLayout::concat) runs_[0] = n_row;
  else pool_.emplace(n_row / block_size, block_size);
}

std::optional<int64_t> KvSpace::take_run(int64_t n) {
  for (auto it = runs_.begin(); it != runs_.end(); ++it) {
    if (it->second < n) continue;
    const auto [start, length] = *it;
    runs_.erase(it);
    if (length > n) runs_[start + n] = length - n;
    return start;
  }
  return std::nullopt;
}

void KvSpace::give_run(int64_t start, int64_t n) {
  auto [it, fresh] = runs_.emplace(start, n);
  MM_CHECK(fresh);
  if (const auto next = std::next(it); next != runs_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    runs_.erase(next);
  }
  if (it == runs_.begin()) return;
  const auto before = std::prev(it);
  MM_CHECK(before->first + before->second <= it->first);
  if (before->first + before->second != it->first) return;
  before->second += it->second;
  runs_.erase(it);
}

bool KvSpace::grow(SequenceRows& rows, int64_t n_kept, int64_t n_tok, std::vector<RowCopy>& copies) {
  if (layout_ == KvLayout::concat) {
    if (n_tok <= n_kept) return true;
    const auto run = take_run(n_tok);
    if (!run) return false;
    if (n_kept > 0)
      copies.push_back({static_cast<int32_t>(rows.start), static_cast<int32_t>(*run), static_cast<int32_t>(n_kept)});
    // The old run is given back at once: this step copies from it before it writes, later ones come after.
    if (rows.start >= 0) give_run(rows.start, rows.capacity);
    rows.start = *run;
    rows.capacity = rows.n_row = n_tok;
    return true;
  }
  const int64_t need = (n_tok + block_size_ - 1) / block_size_, have = static_cast<int64_t>(rows.blocks.size());
  // A block that is written must be ours alone. Only the one in which the kept tokens end can be shared: with a forked
  // sibling, which may even have filled and published it.
  const int64_t first = n_kept / block_size_;
  const bool copy = first < have && n_tok > n_kept && !pool_->exclusive(rows.blocks[static_cast<size_t>(first)]);
  if (std::max<int64_t>(0, need - have) + (copy ? 1 : 0) > pool_->n_free()) return false;
  if (copy) {
    int32_t& block = rows.blocks[static_cast<size_t>(first)];
    const int32_t own = *pool_->allocate();
    if (const int64_t count = n_kept % block_size_; count > 0)
      copies.push_back({static_cast<int32_t>(block * block_size_), static_cast<int32_t>(own * block_size_),
                        static_cast<int32_t>(count)});
    pool_->release(block);
    block = own;
  }
  for (int64_t i = have; i < need; i++) rows.blocks.push_back(*pool_->allocate());
  rows.n_row = static_cast<int64_t>(rows.blocks.size()) * block_size_;
  return true;
}

bool KvSpace::fork(const SequenceRows& parent, int64_t n_tok, SequenceRows& child, std::vector<RowCopy>& copies) {
  MM_CHECK(child.blocks.empty() && child.start < 0);
  if (layout_ == KvLayout::paged) {
    const int64_t n = (n_tok + block_size_ - 1) / block_size_;
    child.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + n);
    for (const int32_t b : child.blocks) pool_->retain(b);
    child.n_row = n * block_size_;
    child.n_published = std::min(parent.n_published, n_tok / block_size_);
    child.content = child.n_published == parent.n_published ? parent.content : 0;
    if (child.n_published != parent.n_published) child.n_published = 0;
    return true;
  }
  if (!grow(child, 0, n_tok, copies)) return false;
  if (n_tok > 0) copies.push_back({row(parent, 0), row(child, 0), static_cast<int32_t>(n_tok)});
  return true;
}

void KvSpace::release(SequenceRows& rows) {
  // From the last to the first: the beginning of a text is worth more than its end.
  for (auto it = rows.blocks.rbegin(); it != rows.blocks.rend(); ++it) pool_->release(*it);
  if (rows.start >= 0) give_run(rows.start, rows.capacity);
  rows = {};
}

int64_t KvSpace::match(SequenceRows& rows, std::span<const int32_t> tokens, int64_t limit) {
  MM_CHECK(rows.blocks.empty());
  if (!prefix_cache_) return 0;
  const auto size = static_cast<size_t>(block_size_);
  size_t at = 0;
  while (static_cast<int64_t>(at + size) <= std::min(limit, static_cast<int64_t>(tokens.size()))) {
    const auto found = pool_->find(rows.content, tokens.subspan(at, size));
    if (!found) break;
    pool_->retain(found->block);
    rows.blocks.push_back(found->block);
    rows.content = found->content;
    at += size;
  }
  rows.n_published = static_cast<int64_t>(rows.blocks.size());
  rows.n_row = rows.n_published * block_size_;
  return rows.n_row;
}

void KvSpace::publish(SequenceRows& rows, std::span<const int32_t> tokens, int64_t n_tok) {
  if (!prefix_cache_) return;
  while ((rows.n_published + 1) * block_size_ <= n_tok) {
    const auto i = static_cast<size_t>(rows.n_published);
    const auto of_block = tokens.subspan(i * static_cast<size_t>(block_size_), static_cast<size_t>(block_size_));
    const int32_t block = rows.blocks[i];
    rows.content = pool_->publish(block, rows.content, of_block);
    rows.n_published++;
  }
}

void KvSpace::forget() {
  if (!pool_) return;
  MM_CHECK(pool_->n_used() == 0);
  pool_.emplace(pool_->n_block(), block_size_);
}

int64_t KvSpace::free_rows() const {
  if (pool_) return pool_->n_free() * block_size_;
  int64_t longest = 0;
  for (const auto& [start, length] : runs_) longest = std::max(longest, length);
  return longest;
}

int64_t KvSpace::rows_for(int64_t n_tok) const {
  if (!pool_) return n_tok;
  return (n_tok + block_size_ - 1) / block_size_ * block_size_;
}

int32_t KvSpace::row(const SequenceRows& rows, int64_t token) const {
  MM_CHECK(token >= 0 && token < rows.n_row);
  if (!pool_) return static_cast<int32_t>(rows.start + token);
  return static_cast<int32_t>(rows.blocks[static_cast<size_t>(token / block_size_)] * block_size_ +
                              token % block_size_);
}

void KvSpace::append_table(const SequenceRows& rows, std::vector<int32_t>& table) const {
  if (!pool_) {
    table.push_back(static_cast<int32_t>(rows.start));
    return;
  }
  for (const int32_t b : rows.blocks) table.push_back(static_cast<int32_t>(b * block_size_));
}

int64_t KvSpace::table_entries(int64_t n_tok) const {
  return pool_ ? std::max<int64_t>(1, (n_tok + block_size_ - 1) / block_size_) : 1;
}

void KvSpace::check() const {
  if (pool_) pool_->check();
  int64_t end = -1;
  for (const auto& [start, length] : runs_) {
    MM_CHECK(start > end && length > 0 && start + length <= n_row_);
    end = start + length;
  }
}

}  // namespace mm
