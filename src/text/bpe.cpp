#include "text/bpe.h"

#include <algorithm>
#include <limits>
#include <queue>

#include "base/error.h"

namespace mm {

namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;
constexpr size_t kShort = 256;  // bytes; up to here scanning for the least rank beats a heap

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

BpeMerger::BpeMerger(const std::vector<Merge>& merges, const std::array<int32_t, 256>& byte_ids) : byte_ids_(byte_ids) {
  MM_CHECK(merges.size() <= kMaxMerges);
  int bits = 4;
  while ((size_t{1} << bits) < merges.size() * 2) bits++;
  shift_ = 64 - bits;
  mask_ = (uint64_t{1} << bits) - 1;
  slots_.assign(mask_ + 1, Slot{kEmpty, kNoRank});
  results_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); rank++) {
    const uint64_t key = pair_key(merges[rank].left, merges[rank].right);
    uint64_t slot = key * kMultiplier >> shift_;
    while (slots_[slot].key != kEmpty && slots_[slot].key != key) slot = (slot + 1) & mask_;
    slots_[slot] = {key, static_cast<int32_t>(rank)};
    results_.push_back(merges[rank].result);
  }
}

inline int32_t BpeMerger::rank_of(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (uint64_t slot = key * kMultiplier >> shift_;; slot = (slot + 1) & mask_) {
    const Slot& s = slots_[slot];
    if (s.key == key || s.key == kEmpty) return s.rank;
  }
}

void BpeMerger::encode_word(std::string_view word, std::vector<int32_t>& ids) const {
  if (word.size() <= kShort) encode_short(word, ids);
  else encode_long(word, ids);
}

void BpeMerger::encode_short(std::string_view word, std::vector<int32_t>& ids) const {
  // Symbols stay at the positions of their first bytes, linked. order[i] = rank * 256 + i of the pair that begins at i,
  // so that the least number is the next pair to merge and tells where it is.
  static_assert(kShort == 256);
  int32_t order[kShort];
  int32_t sym[kShort];
  uint16_t next[kShort], prev[kShort];
  const size_t n = word.size();
  if (n == 0) return;
  for (size_t i = 0; i < n; i++) {
    sym[i] = byte_ids_[static_cast<uint8_t>(word[i])];
    next[i] = static_cast<uint16_t>(i + 1);
    prev[i] = static_cast<uint16_t>(i - 1);  // wraps at 0 and is not used there
  }
  const auto order_of = [&](size_t i, size_t right) {
    const int32_t rank = rank_of(sym[i], sym[right]);
    return rank == kNoRank ? kNoRank : rank << 8 | static_cast<int32_t>(i);
  };
  const size_t padded = (n + 15) / 16 * 16;  // whole vectors
  for (size_t i = 0; i + 1 < n; i++) order[i] = order_of(i, i + 1);
  for (size_t i = n - 1; i < padded; i++) order[i] = kNoRank;
  for (;;) {
    int32_t least = kNoRank;
    for (size_t i = 0; i < padded; i++) least = std::min(least, order[i]);
    if (least == kNoRank) break;
    const size_t i = static_cast<size_t>(least & 255), right = next[i], after = next[right];
    sym[i] = results_[static_cast<size_t>(least >> 8)];
    order[right] = kNoRank;
    next[i] = static_cast<uint16_t>(after);
    if (after < n) prev[after] = static_cast<uint16_t>(i);
    order[i] = after < n ? order_of(i, after) : kNoRank;
    if (i > 0) order[prev[i]] = order_of(prev[i], i);
  }
  for (size_t i = 0; i < n; i = next[i]) ids.push_back(sym[i]);
}

void BpeMerger::encode_long(std::string_view word, std::vector<int32_t>& ids) const {
  // Symbols are linked by the positions of their first bytes; a merged right half is marked by rank -1.
  const size_t n = word.size();
  constexpr int32_t kGone = -1;
  std::vector<int32_t> sym(n), rank(n, kNoRank);
  std::vector<size_t> next(n), prev(n);
  using Item = std::pair<int32_t, size_t>;  // rank, position: the heap's top is the least rank, leftmost
  std::vector<Item> items;
  items.reserve(n);
  for (size_t i = 0; i < n; i++) {
    sym[i] = byte_ids_[static_cast<uint8_t>(word[i])];
    next[i] = i + 1;
    prev[i] = i - 1;  // wraps at 0 and is not used there
  }
  for (size_t i = 0; i + 1 < n; i++) {
    rank[i] = rank_of(sym[i], sym[i + 1]);
    if (rank[i] != kNoRank) items.emplace_back(rank[i], i);
  }
  std::priority_queue<Item, std::vector<Item>, std::greater<>> heap(std::greater<>{}, std::move(items));
  const auto update = [&](size_t i) {
    rank[i] = next[i] < n ? rank_of(sym[i], sym[next[i]]) : kNoRank;
    if (rank[i] != kNoRank) heap.emplace(rank[i], i);
  };
  while (!heap.empty()) {
    const auto [r, i] = heap.top();
    heap.pop();
    if (rank[i] != r) continue;  // the pair has changed since
    const size_t right = next[i];
    sym[i] = results_[static_cast<size_t>(r)];
    rank[right] = kGone;
    next[i] = next[right];
    if (next[i] < n) prev[next[i]] = i;
    update(i);
    if (i > 0) update(prev[i]);
  }
  for (size_t i = 0; i < n; i = next[i]) ids.push_back(sym[i]);
}

}  // namespace mm
