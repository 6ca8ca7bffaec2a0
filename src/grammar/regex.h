// Regular expressions, in the syntax and with the meaning of ECMAScript with the flags u and s off, on whole
// characters. Without look-around, back-references, word boundaries and \p; a lazy quantifier means the same as a
// greedy one here, since only which texts match matters.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/char_set.h"
#include "grammar/graph.h"

namespace mm::grammar {

struct Regex {
  enum class Kind : uint8_t { chars, concat, alternate, repeat, begin, end };
  Kind kind = Kind::concat;  // of no parts: the empty text
  CharSet chars;
  std::vector<Regex> parts;  // of a repeat: one
  int32_t min = 0, max = 0;  // of a repeat; max may be kUnbounded
  size_t position = 0;       // in the pattern, in bytes
};

enum class RegexMatch {
  whole,   // the pattern describes the whole text; ^ and $ are allowed at its ends and change nothing
  search,  // JSON schema's `pattern`: anywhere in the text, unless ^ or $ bind it to the ends
};

// The expression of whole texts, without anchors. Error naming `where` and the position of what is not supported.
Regex parse_regex(std::string_view pattern, RegexMatch match, const std::string& where);

NodeId regex_node(CharNodes& chars, const Regex& regex);

// Texts of min to max characters that all of the expressions match, as a deterministic automaton. Error naming `where`
// where it would have too many states.
NodeId intersection_node(CharNodes& chars, const std::vector<Regex>& all, int32_t min, int32_t max,
                         const std::string& where);

}  // namespace mm::grammar
