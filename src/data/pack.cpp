#include "data/pack.h"

#include <deque>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/rng.h"

namespace mm {

static std::vector<uint32_t> epoch_order(size_t n, const LoaderOptions& o, int64_t epoch) {
  std::vector<uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (!o.shuffle) return order;
  constexpr uint64_t stream = uint64_t{0x73687566} << 32;  // "shuf", then the epoch
  Rng rng{o.seed, stream + static_cast<uint64_t>(epoch), 0};
  for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[rng.below(i)]);
  return order;
}

namespace {

// The next rows in training order, to be taken by age or by length.
class Window {
 public:
  Window(const std::vector<int32_t>& len, const std::vector<uint32_t>& order) : len_(len), order_(order) {}

  bool empty() {
    refill();
    return by_len_.empty();
  }
  int64_t oldest_len() {
    refill();
    while (taken_[0]) {
      taken_.pop_front();
      first_++;
    }
    return len_[order_[first_]];
  }
  uint32_t take_oldest() {
    oldest_len();
    return take(first_);
  }
  // The longest row of at most `space` tokens, the oldest of these; false if there is none.
  bool take_longest(int64_t space, uint32_t& row) {
    refill();
    auto it = by_len_.upper_bound({space, 0});  // ages are negative or zero: behind all rows of this length
    if (it == by_len_.begin()) return false;
    --it;
    row = take(static_cast<size_t>(-it->second));
    return true;
  }

 private:
  void refill() {
    while (by_len_.size() < static_cast<size_t>(pack_window) && next_ < order_.size()) {
      by_len_.insert({len_[order_[next_]], -static_cast<int64_t>(next_)});
      taken_.push_back(false);
      next_++;
    }
  }
  uint32_t take(size_t at) {
    const uint32_t row = order_[at];
    taken_[at - first_] = true;
    by_len_.erase({len_[row], -static_cast<int64_t>(at)});
    return row;
  }

  const std::vector<int32_t>& len_;
  const std::vector<uint32_t>& order_;
  size_t first_ = 0, next_ = 0;  // positions in order_: of taken_[0], of the next row to enter
  std::deque<bool> taken_;
  std::set<std::pair<int64_t, int64_t>> by_len_;  // (length, -position)
};

}  // namespace

EpochPlan plan_epoch(const std::vector<int32_t>& row_len, const LoaderOptions& o, int64_t epoch) {
  MM_CHECK(o.batch_size > 0 && o.seq_len > 0);
  const std::vector<uint32_t> order = epoch_order(row_len.size(), o, epoch);
  EpochPlan plan;
  if (!o.packed) {
    plan.rows = order;
    const int64_t n = static_cast<int64_t>(order.size());
    for (int64_t at = 0; at < n; at += o.batch_size) plan.batch_begin.push_back(at);
    plan.batch_begin.push_back(n);
    return plan;
  }
  plan.rows.reserve(order.size());
  Window window(row_len, order);
  while (!window.empty()) {
    plan.batch_begin.push_back(static_cast<int64_t>(plan.rows.size()));
    int64_t space = o.batch_size * o.seq_len;
    MM_CHECK(window.oldest_len() <= space);
    while (!window.empty() && window.oldest_len() <= space) {
      plan.rows.push_back(window.take_oldest());
      space -= row_len[plan.rows.back()];
    }
    for (uint32_t row; window.take_longest(space, row);) {
      plan.rows.push_back(row);
      space -= row_len[row];
    }
  }
  plan.batch_begin.push_back(static_cast<int64_t>(plan.rows.size()));
  return plan;
}

}  // namespace mm
