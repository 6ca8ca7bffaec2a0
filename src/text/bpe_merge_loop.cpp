#include "text/bpe_merge_loop.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/progress.h"

namespace mm {

namespace {

uint64_t pair_key(int32_t a, int32_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32 | static_cast<uint32_t>(b);
}

constexpr uint64_t kNoPair = ~uint64_t{0};

size_t slot_of(uint64_t pair, size_t mask) {
  pair = (pair ^ pair >> 29) * 0xBF58476D1CE4E5B9ull;
  return (pair ^ pair >> 32) & mask;
}

}  // namespace

int64_t& PairCounts::operator[](uint64_t pair) {
  if ((used_ + 1) * 8 > slots_.size() * 5) {
    std::vector<Slot> old =
        std::exchange(slots_, std::vector<Slot>(std::max<size_t>(1024, slots_.size() * 2), {kNoPair, 0}));
    for (const Slot& s : old) {
      if (s.pair == kNoPair) continue;
      size_t k = slot_of(s.pair, slots_.size() - 1);
      while (slots_[k].pair != kNoPair) k = (k + 1) & (slots_.size() - 1);
      slots_[k] = s;
    }
  }
  const size_t mask = slots_.size() - 1;
  size_t k = slot_of(pair, mask);
  while (slots_[k].pair != pair) {
    if (slots_[k].pair == kNoPair) {
      slots_[k].pair = pair;
      used_++;
      break;
    }
    k = (k + 1) & mask;
  }
  return slots_[k].count;
}

MergeLoop::MergeLoop(const std::array<int32_t, 256>& byte_ids, std::vector<std::string> tokens)
    : byte_ids_(byte_ids), tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); i++) ids_.emplace(tokens_[i], static_cast<int32_t>(i));
}

void MergeLoop::add_word(std::string_view bytes, int64_t count) {
  starts_.push_back(symbols_.size());
  lengths_.push_back(static_cast<uint32_t>(bytes.size()));
  counts_.push_back(count);
  for (const char c : bytes) symbols_.push_back(byte_ids_[static_cast<uint8_t>(c)]);
}

void MergeLoop::push(uint64_t pair, Where where) {
  const int64_t count = pair_counts_[pair];
  if (count <= 0) return;
  uint32_t slot;
  if (free_lists_.empty()) {
    slot = static_cast<uint32_t>(lists_.size());
    lists_.push_back(std::move(where));
  } else {
    slot = free_lists_.back();
    free_lists_.pop_back();
    lists_[slot] = std::move(where);
  }
  queue_.push_back({count, pair, slot});
  std::push_heap(queue_.begin(), queue_.end());
}

void MergeLoop::count_pairs() {
  // At the start all symbols are bytes, so a plain table of pairs does.
  std::array<int32_t, 256> ids = byte_ids_;
  const int32_t base = *std::min_element(ids.begin(), ids.end());
  const auto span = static_cast<size_t>(*std::max_element(ids.begin(), ids.end()) - base) + 1;
  std::vector<int64_t> count(span * span, 0);
  std::vector<Where> where(span * span);
  for (size_t w = 0; w < starts_.size(); w++) {
    const int32_t* s = symbols_.data() + starts_[w];
    for (uint32_t i = 0; i + 1 < lengths_[w]; i++) {
      const size_t p = static_cast<size_t>(s[i] - base) * span + static_cast<size_t>(s[i + 1] - base);
      count[p] += counts_[w];
      if (where[p].empty() || where[p].back() != w) where[p].push_back(static_cast<uint32_t>(w));
    }
  }
  for (size_t p = 0; p < where.size(); p++) {
    if (where[p].empty()) continue;
    const uint64_t key = pair_key(static_cast<int32_t>(p / span) + base, static_cast<int32_t>(p % span) + base);
    pair_counts_[key] = count[p];
    where[p].shrink_to_fit();
    push(key, std::move(where[p]));
  }
}

void MergeLoop::Side::fit(size_t symbols) {
  changed.resize(symbols, 0);
  where.resize(symbols);
}

inline void MergeLoop::Side::add(int32_t x, int64_t count, uint32_t word) {
  const auto k = static_cast<size_t>(x);
  if (changed[k] == 0) touched.push_back(x);
  changed[k] += count;
  if (where[k].empty() || where[k].back() != word) where[k].push_back(word);
}

void MergeLoop::merge_words(const Where& words, const BpeMerger::Merge& m) {
  for (size_t k = 0; k < words.size(); k++) {
    if (k + 8 < words.size()) __builtin_prefetch(symbols_.data() + starts_[words[k + 8]]);
    const uint32_t w = words[k];
    int32_t* s = symbols_.data() + starts_[w];
    const uint32_t n = lengths_[w];
    uint32_t i = 0;
    while (i + 1 < n && (s[i] != m.left || s[i + 1] != m.right)) i++;
    if (i + 1 >= n) continue;
    uint32_t out = i;
    while (i < n) {
      if (i + 1 < n && s[i] == m.left && s[i + 1] == m.right) {
        if (out > 0) left_.add(s[out - 1], counts_[w], w);
        i += 2;
        s[out++] = m.result;
        if (i < n) right_.add(s[i], counts_[w], w);
      } else {
        s[out++] = s[i++];
      }
    }
    lengths_[w] = out;
  }
}

void MergeLoop::apply(const BpeMerger::Merge& m) {
  // Counts first, all of them; then an item for every pair that was formed.
  std::vector<std::pair<uint64_t, Where>> formed;
  Where both;  // of (c, c), which is formed on either side
  const auto collect = [&](Side& side, auto&& lost_pair, auto&& won_pair) {
    std::sort(side.touched.begin(), side.touched.end());
    for (const int32_t x : side.touched) {
      const auto k = static_cast<size_t>(x);
      const int64_t changed = std::exchange(side.changed[k], 0);
      Where where = std::exchange(side.where[k], {});
      pair_counts_[lost_pair(x)] -= changed;
      pair_counts_[won_pair(x)] += changed;
      if (x == m.result) both.insert(both.end(), where.begin(), where.end());
      else formed.emplace_back(won_pair(x), std::move(where));
    }
    side.touched.clear();
  };
  collect(
      left_, [&](int32_t x) { return pair_key(x, m.left); }, [&](int32_t x) { return pair_key(x, m.result); });
  collect(
      right_, [&](int32_t x) { return pair_key(m.right, x); }, [&](int32_t x) { return pair_key(m.result, x); });
  if (!both.empty()) {
    std::sort(both.begin(), both.end());
    both.erase(std::unique(both.begin(), both.end()), both.end());
    formed.emplace_back(pair_key(m.result, m.result), std::move(both));
  }
  for (auto& [pair, where] : formed) push(pair, std::move(where));
}

void MergeLoop::run(int32_t vocab_size, int64_t min_frequency) {
  count_pairs();
  const auto start = static_cast<int64_t>(tokens_.size());
  Progress progress("train tokenizer", vocab_size - start, "merges");
  while (static_cast<int64_t>(tokens_.size()) < vocab_size && !queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end());
    Item top = queue_.back();
    const int64_t now = pair_counts_[top.pair];
    if (top.count != now) {
      queue_.back().count = now;
      std::push_heap(queue_.begin(), queue_.end());
      continue;
    }
    if (top.count < 1 || top.count < min_frequency) break;
    queue_.pop_back();

    BpeMerger::Merge m{static_cast<int32_t>(top.pair >> 32), static_cast<int32_t>(top.pair & 0xFFFFFFFFu), 0};
    std::string token = tokens_[static_cast<size_t>(m.left)] + tokens_[static_cast<size_t>(m.right)];
    const auto [known, is_new] = ids_.try_emplace(token, static_cast<int32_t>(tokens_.size()));
    m.result = known->second;
    if (is_new) tokens_.push_back(std::move(token));
    merges_.push_back(m);

    left_.fit(tokens_.size());
    right_.fit(tokens_.size());
    const Where where = std::exchange(lists_[top.where], {});
    free_lists_.push_back(top.where);
    merge_words(where, m);
    apply(m);
    progress.set(static_cast<int64_t>(tokens_.size()) - start);
  }
  progress.finish();
}

std::vector<BpeMerger::Merge> MergeLoop::merges() const {
  std::vector<BpeMerger::Merge> out;
  std::unordered_set<uint64_t> seen;
  for (auto m = merges_.rbegin(); m != merges_.rend(); ++m) {
    if (seen.insert(pair_key(m->left, m->right)).second) out.push_back(*m);
  }
  std::reverse(out.begin(), out.end());
  return out;
}

}  // namespace mm
