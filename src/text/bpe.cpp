#include "text/bpe.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <queue>

namespace mm {

namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();
constexpr size_t kShort = 256;  // bytes; up to here scanning for the least rank beats a heap

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

BpeMerger::BpeMerger(const std::vector<Merge>& merges, const std::array<int32_t, 256>& byte_ids) : byte_ids_(byte_ids) {
  int bits = 4;
  while ((size_t{1} << bits) < merges.size() * 2) bits++;
  shift_ = 64 - bits;
  mask_ = (uint64_t{1} << bits) - 1;
  keys_.assign(mask_ + 1, kEmpty);
  found_.assign(mask_ + 1, Found{kNoRank, -1});
  for (size_t rank = 0; rank < merges.size(); rank++) {
    const uint64_t key = pair_key(merges[rank].left, merges[rank].right);
    uint64_t slot = key * 0x9E3779B97F4A7C15ull >> shift_;
    while (keys_[slot] != kEmpty && keys_[slot] != key) slot = (slot + 1) & mask_;
    keys_[slot] = key;
    found_[slot] = {static_cast<int32_t>(rank), merges[rank].result};
  }
}

inline const BpeMerger::Found* BpeMerger::find(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  uint64_t slot = key * 0x9E3779B97F4A7C15ull >> shift_;
  while (keys_[slot] != key) {
    if (keys_[slot] == kEmpty) return nullptr;
    slot = (slot + 1) & mask_;
  }
  return &found_[slot];
}

inline int32_t BpeMerger::rank_of(int32_t left, int32_t right) const {
  const Found* f = find(left, right);
  return f != nullptr ? f->rank : kNoRank;
}

void BpeMerger::encode_word(std::string_view word, std::vector<int32_t>& ids) const {
  if (word.size() <= kShort) encode_short(word, ids);
  else encode_long(word, ids);
}

void BpeMerger::encode_short(std::string_view word, std::vector<int32_t>& ids) const {
  int32_t sym[kShort], rank[kShort];  // rank[i]: of the pair (i, i + 1)
  size_t n = word.size();
  if (n == 0) return;
  for (size_t i = 0; i < n; i++) sym[i] = byte_ids_[static_cast<uint8_t>(word[i])];
  for (size_t i = 0; i + 1 < n; i++) rank[i] = rank_of(sym[i], sym[i + 1]);
  while (n > 1) {
    int32_t least = kNoRank;
    for (size_t i = 0; i + 1 < n; i++) least = std::min(least, rank[i]);
    if (least == kNoRank) break;
    size_t i = 0;
    while (rank[i] != least) i++;
    sym[i] = find(sym[i], sym[i + 1])->result;
    n--;
    std::memmove(sym + i + 1, sym + i + 2, (n - i - 1) * sizeof(int32_t));
    if (i + 1 < n) {
      std::memmove(rank + i + 1, rank + i + 2, (n - i - 2) * sizeof(int32_t));
      rank[i] = rank_of(sym[i], sym[i + 1]);
    }
    if (i > 0) rank[i - 1] = rank_of(sym[i - 1], sym[i]);
  }
  ids.insert(ids.end(), sym, sym + n);
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
    sym[i] = find(sym[i], sym[right])->result;
    rank[right] = kGone;
    next[i] = next[right];
    if (next[i] < n) prev[next[i]] = i;
    update(i);
    if (i > 0) update(prev[i]);
  }
  for (size_t i = 0; i < n; i = next[i]) ids.push_back(sym[i]);
}

}  // namespace mm
