// Decimal numbers within bounds, digit by digit.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "grammar/graph.h"

namespace mm::grammar {

// Digits of integers, and of numbers before and after the point: what a double distinguishes, and an int64 holds.
inline constexpr int kMaxIntegerDigits = 18;
inline constexpr int kMaxNumberDigits = 15;
inline constexpr int64_t kLargestInteger = 999'999'999'999'999'999;

// Integers low <= i <= high, without leading zeros and without -0. |low|, |high| <= kLargestInteger.
NodeId integer_node(GraphBuilder& builder, int64_t low, int64_t high);

struct Bound {
  bool negative = false;
  std::string whole;     // digits before the point, without leading zeros; "0" if none
  std::string fraction;  // digits after the point, without trailing zeros
  bool exclusive = false;
  bool is_zero() const { return whole == "0" && fraction.empty(); }
};

// Reads a finite double as nlohmann writes it ("-1.5e+3"), exactly.
Bound parse_bound(std::string_view number, bool exclusive);
int compare_bounds(const Bound& a, const Bound& b);  // -1, 0, 1 as the value of a is less, equal, greater

// Any number: at most 15 digits before and after the point, an exponent of at most two digits.
NodeId any_number_node(GraphBuilder& builder);
// Numbers within bounds, without exponent. Bounds have at most 15 digits in all (the caller sees to it).
NodeId number_node(GraphBuilder& builder, const std::optional<Bound>& low, const std::optional<Bound>& high);

}  // namespace mm::grammar
