// The calculator behind the demo's tool: whole numbers, + - * / and parentheses.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace mm {

// Value of an expression such as "(12+3)*4". Division must leave no remainder. Nothing on anything else: other
// characters, an unfinished expression, a result (or step) beyond 64 bits, nesting deeper than 64.
std::optional<int64_t> calculate(std::string_view expression);

}  // namespace mm
