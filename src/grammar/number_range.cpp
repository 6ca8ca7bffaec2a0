#include "grammar/number_range.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <tuple>

#include "base/error.h"

namespace mm::grammar {

namespace {

ByteSet digit_set(int first, int last) {
  ByteSet set{};
  add_bytes(set, static_cast<unsigned>('0' + first), static_cast<unsigned>('0' + last));
  return set;
}

NodeId digits(GraphBuilder& b, int32_t min, int32_t max) { return b.repeat(b.byte(digit_set(0, 9)), min, max); }

// Digit strings of one length between two of that length; `tight` ends still have to be compared.
NodeId digits_between(GraphBuilder& b, std::string_view low, std::string_view high, bool tight_low, bool tight_high) {
  if (low.empty()) return kEmpty;
  const auto length = static_cast<int32_t>(low.size());
  tight_low = tight_low && low.find_first_not_of('0') != low.npos;
  tight_high = tight_high && high.find_first_not_of('9') != high.npos;
  if (!tight_low && !tight_high) return digits(b, length, length);
  const int from = tight_low ? low[0] - '0' : 0, to = tight_high ? high[0] - '0' : 9;
  const auto rest = [&](bool keep_low, bool keep_high) {
    return digits_between(b, low.substr(1), high.substr(1), keep_low, keep_high);
  };
  const auto digit = [&](int first, int last, NodeId next) {
    return first > last ? kNever : b.seq(b.byte(digit_set(first, last)), next);
  };
  if (from == to) return digit(from, to, rest(tight_low, tight_high));
  std::vector<NodeId> choices;
  if (tight_low) choices.push_back(digit(from, from, rest(true, false)));
  if (tight_high) choices.push_back(digit(to, to, rest(false, true)));
  choices.push_back(digit(from + tight_low, to - tight_high, rest(false, false)));
  return b.alt(choices);
}

NodeId natural_node(GraphBuilder& b, int64_t low, int64_t high) {  // 0 <= low
  std::vector<NodeId> choices;
  int whole_from = 0, whole_to = 0;  // lengths of which all numbers are in
  int64_t first = 0, end = 10;       // of this many digits
  for (int n = 1; n <= kMaxIntegerDigits && first <= high; n++) {
    const int64_t from = std::max(first, low), to = std::min(end - 1, high);
    if (from <= to && (n == 1 || from > first || to < end - 1)) {
      choices.push_back(digits_between(b, std::to_string(from), std::to_string(to), true, true));
    } else if (from <= to) {
      whole_from = whole_from == 0 ? n : whole_from;
      whole_to = n;
    }
    first = end;
    if (n < kMaxIntegerDigits) end *= 10;
  }
  if (whole_from > 0) choices.push_back(b.seq(b.byte(digit_set(1, 9)), digits(b, whole_from - 1, whole_to - 1)));
  return b.alt(choices);
}

// What follows the whole part: nothing, or a point and up to `max_digits` digits, so that the value's fraction is at
// least `low` and at most `high`, where given.
class FractionBuilder {
 public:
  FractionBuilder(GraphBuilder& b, const Bound* low, const Bound* high, int max_digits)
      : b_(b), low_(low), high_(high), max_digits_(max_digits) {}

  NodeId build() {
    const bool low = low_ != nullptr, high = high_ != nullptr;
    const NodeId point = max_digits_ > 0 ? b_.seq(b_.byte('.'), after(0, low, high)) : kNever;
    return may_end(0, low, high) ? b_.optional(point) : point;
  }

 private:
  // After n digits that equal those of the tight bounds: what is missing reads as zeros.
  bool may_end(size_t n, bool tight_low, bool tight_high) const {
    if (tight_low && (n < low_->fraction.size() || low_->exclusive)) return false;
    return !(tight_high && n >= high_->fraction.size() && high_->exclusive);
  }

  NodeId after(size_t n, bool tight_low, bool tight_high) {
    // At least the bound's digits were read and the bound counts: all that follows is enough.
    if (tight_low && n >= low_->fraction.size() && !low_->exclusive) tight_low = false;
    const auto [it, fresh] = known_.try_emplace({n, tight_low, tight_high}, kNever);
    if (!fresh) return it->second;
    std::vector<NodeId> choices;
    if (n > 0 && may_end(n, tight_low, tight_high)) choices.push_back(kEmpty);
    if (n < static_cast<size_t>(max_digits_)) {
      const auto digit_of = [&](const Bound* bound) {
        return n < bound->fraction.size() ? bound->fraction[n] - '0' : 0;
      };
      const int from = tight_low ? digit_of(low_) : 0, to = tight_high ? digit_of(high_) : 9;
      for (int d = from; d <= to; d++) {
        const NodeId next = after(n + 1, tight_low && d == from, tight_high && d == to);
        if (next != kNever) choices.push_back(b_.seq(b_.byte(digit_set(d, d)), next));
      }
    }
    return known_[{n, tight_low, tight_high}] = b_.alt(choices);
  }

  GraphBuilder& b_;
  const Bound* low_;
  const Bound* high_;
  const int max_digits_;
  std::map<std::tuple<size_t, bool, bool>, NodeId> known_;
};

// -1, 0, 1 for |a| <, =, > |b|
int compare_sizes(const Bound& a, const Bound& b) {
  if (a.whole.size() != b.whole.size()) return a.whole.size() < b.whole.size() ? -1 : 1;
  const int whole = a.whole.compare(b.whole);
  const int order = whole != 0 ? whole : a.fraction.compare(b.fraction);
  return order < 0 ? -1 : order > 0 ? 1 : 0;
}

// Numbers >= 0 from `low` to `high` (no upper bound if null).
NodeId size_node(GraphBuilder& b, const Bound& low, const Bound* high, int max_digits) {
  if (high != nullptr) {
    const int order = compare_sizes(low, *high);
    if (order > 0 || (order == 0 && (low.exclusive || high->exclusive))) return kNever;
  }
  const auto fraction = [&](const Bound* from, const Bound* to) {
    return FractionBuilder(b, from, to, max_digits).build();
  };
  const int64_t from = std::stoll(low.whole);
  const int64_t to = high != nullptr ? std::stoll(high->whole) : 999'999'999'999'999;
  if (high != nullptr && from == to) return b.seq(b.literal(low.whole), fraction(&low, high));
  std::vector<NodeId> choices{b.seq(b.literal(low.whole), fraction(&low, nullptr))};
  if (high != nullptr) choices.push_back(b.seq(b.literal(high->whole), fraction(nullptr, high)));
  const int64_t last = high != nullptr ? to - 1 : to;
  if (from + 1 <= last) choices.push_back(b.seq(natural_node(b, from + 1, last), fraction(nullptr, nullptr)));
  return b.alt(choices);
}

}  // namespace

NodeId integer_node(GraphBuilder& b, int64_t low, int64_t high) {
  b.spend(500);
  low = std::max(low, -kLargestInteger);
  high = std::min(high, kLargestInteger);
  std::vector<NodeId> choices;
  if (low < 0 && low <= high) choices.push_back(b.byte('-', natural_node(b, std::max<int64_t>(1, -high), -low)));
  if (high >= 0) choices.push_back(natural_node(b, std::max<int64_t>(low, 0), high));
  return b.alt(choices);
}

Bound parse_bound(std::string_view number, bool exclusive) {
  Bound out{.exclusive = exclusive};
  std::string digits;
  size_t i = 0;
  if (i < number.size() && number[i] == '-') out.negative = true, i++;
  int point = -1;
  for (; i < number.size() && number[i] != 'e' && number[i] != 'E'; i++) {
    if (number[i] == '.') point = static_cast<int>(digits.size());
    else digits += number[i];
  }
  if (point < 0) point = static_cast<int>(digits.size());
  if (i < number.size()) point += std::stoi(std::string(number.substr(i + 1)));
  MM_CHECK(digits.size() <= 400 && std::abs(point) <= 400, "{}", number);
  if (point < 0) digits.insert(0, static_cast<size_t>(-point), '0'), point = 0;
  if (point > static_cast<int>(digits.size())) digits.append(static_cast<size_t>(point) - digits.size(), '0');
  out.whole = digits.substr(0, static_cast<size_t>(point));
  out.fraction = digits.substr(static_cast<size_t>(point));
  out.whole.erase(0, std::min(out.whole.find_first_not_of('0'), out.whole.size()));
  if (out.whole.empty()) out.whole.push_back('0');
  while (!out.fraction.empty() && out.fraction.back() == '0') out.fraction.pop_back();
  if (out.is_zero()) out.negative = false;
  return out;
}

int compare_bounds(const Bound& a, const Bound& b) {
  if (a.negative != b.negative) return a.negative ? -1 : 1;
  return a.negative ? compare_sizes(b, a) : compare_sizes(a, b);
}

NodeId any_number_node(GraphBuilder& b) {
  ByteSet exponent{}, sign{};
  add_bytes(exponent, 'e', 'e'), add_bytes(exponent, 'E', 'E');
  add_bytes(sign, '+', '+'), add_bytes(sign, '-', '-');
  const NodeId whole = b.alt({b.byte('0'), b.seq(b.byte(digit_set(1, 9)), digits(b, 0, kMaxNumberDigits - 1))});
  return b.seq({b.optional(b.byte('-')), whole, b.optional(b.seq(b.byte('.'), digits(b, 1, kMaxNumberDigits))),
                b.optional(b.seq({b.byte(exponent), b.optional(b.byte(sign)), digits(b, 1, 2)}))});
}

NodeId number_node(GraphBuilder& b, const std::optional<Bound>& low, const std::optional<Bound>& high) {
  b.spend(2000);
  // So few digits after the point that two numbers that differ are different doubles too: "< 1" stays true when read.
  size_t whole_digits = 1;
  bool exclusive = false;
  for (const auto* bound : {&low, &high}) {
    if (!*bound) continue;
    whole_digits = std::max(whole_digits, (*bound)->whole.size());
    exclusive |= (*bound)->exclusive;
  }
  const int max_digits = exclusive ? kMaxNumberDigits - static_cast<int>(whole_digits) : kMaxNumberDigits;
  MM_CHECK(max_digits >= 0);
  const Bound zero{.whole = "0"}, above_zero{.whole = "0", .exclusive = true};
  std::vector<NodeId> choices;
  if (!low || low->negative) {  // below zero: sizes between -high (or 0) and -low
    const bool all_negative = high && high->negative;
    choices.push_back(
        b.seq(b.byte('-'), size_node(b, all_negative ? *high : above_zero, low ? &*low : nullptr, max_digits)));
  }
  if (!high || !high->negative)
    choices.push_back(size_node(b, low && !low->negative ? *low : zero, high ? &*high : nullptr, max_digits));
  return b.alt(choices);
}

}  // namespace mm::grammar
