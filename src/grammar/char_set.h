// Sets of Unicode characters, and how their texts are written in bytes: plain UTF-8 or inside a JSON string.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "grammar/graph.h"

namespace mm::grammar {

inline constexpr uint32_t kMaxChar = 0x10FFFF;

// Ranges of code points, sorted, disjoint and not adjacent; without surrogates, which no UTF-8 text holds.
class CharSet {
 public:
  CharSet() = default;
  static CharSet of(std::initializer_list<std::pair<uint32_t, uint32_t>> ranges);
  static CharSet all() { return of({{0, kMaxChar}}); }

  void add(uint32_t first, uint32_t last);
  void add(const CharSet& other);
  CharSet inverted() const;
  CharSet without(const CharSet& other) const;
  bool contains(uint32_t code) const;
  bool empty() const { return ranges_.empty(); }
  const std::vector<std::pair<uint32_t, uint32_t>>& ranges() const { return ranges_; }
  bool operator==(const CharSet&) const = default;
  bool operator<(const CharSet& other) const { return ranges_ < other.ranges_; }

 private:
  std::vector<std::pair<uint32_t, uint32_t>> ranges_;
};

enum class CharEncoding {
  utf8,
  json,  // as JSON writers do: quote, backslash and control characters escaped, all else as it is
};

// The nodes of character sets in one encoding, each made once.
class CharNodes {
 public:
  CharNodes(GraphBuilder& builder, CharEncoding encoding) : b_(builder), encoding_(encoding) {}
  GraphBuilder& builder() { return b_; }
  NodeId of(const CharSet& set);  // one character of the set
  NodeId of(uint32_t code) { return of(CharSet::of({{code, code}})); }

 private:
  GraphBuilder& b_;
  const CharEncoding encoding_;
  std::map<CharSet, NodeId> known_;
};

// Any character of a JSON string, also by any escape that JSON has (surrogates only in pairs).
NodeId any_json_char(GraphBuilder& builder);

// Code points of valid UTF-8; Error naming `where`.
std::vector<uint32_t> decode_utf8(std::string_view text, const std::string& where);
void append_utf8_char(uint32_t code, std::string& out);

}  // namespace mm::grammar
