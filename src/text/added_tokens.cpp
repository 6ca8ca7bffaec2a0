#include "text/added_tokens.h"

#include <algorithm>
#include <cstring>

#include "text/unicode.h"

namespace mm {

AddedTokenMatcher::AddedTokenMatcher(const std::vector<AddedToken>& tokens) : tokens_(tokens), token_at_(1, -1) {
  for (size_t t = 0; t < tokens_.size(); t++) {
    uint32_t node = 0;
    for (const char c : tokens_[t].content) {
      const auto [it, added] =
          next_.try_emplace(uint64_t{node} << 8 | static_cast<uint8_t>(c), static_cast<uint32_t>(token_at_.size()));
      if (added) token_at_.push_back(-1);
      node = it->second;
    }
    token_at_[node] = static_cast<int32_t>(t);
    first_[static_cast<uint8_t>(tokens_[t].content[0])] = true;
  }
  if (std::count(first_.begin(), first_.end(), true) == 1) {
    only_first_ = static_cast<int>(std::find(first_.begin(), first_.end(), true) - first_.begin());
  }
}

bool AddedTokenMatcher::find(std::string_view text, size_t from, Match& match) const {
  for (size_t start = from; start < text.size(); start++) {
    if (only_first_ >= 0) {
      const void* hit = std::memchr(text.data() + start, only_first_, text.size() - start);
      if (hit == nullptr) return false;
      start = static_cast<size_t>(static_cast<const char*>(hit) - text.data());
    } else if (!first_[static_cast<uint8_t>(text[start])]) {
      continue;
    }
    int32_t best = -1;
    uint32_t node = 0;
    for (size_t i = start; i < text.size(); i++) {
      const auto it = next_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[i]));
      if (it == next_.end()) break;
      node = it->second;
      if (token_at_[node] >= 0) {
        best = token_at_[node];
        match = {start, i + 1, static_cast<size_t>(best)};
      }
    }
    if (best >= 0) return true;
  }
  return false;
}

size_t AddedTokenMatcher::spaces_after(std::string_view text, size_t begin) {
  const char *p = text.data() + begin, *const end = text.data() + text.size();
  while (p < end) {
    const Utf8Char c = utf8_at(p, end);
    if (c.length == 0 || char_class(char_class_table(), c.code) != CharClass::space) break;
    p += c.length;
  }
  return static_cast<size_t>(p - text.data());
}

size_t AddedTokenMatcher::spaces_before(std::string_view text, size_t end) {
  while (end > 0) {
    size_t start = end - 1;
    while (start > 0 && end - start < 4 && (static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) start--;
    const Utf8Char c = utf8_at(text.data() + start, text.data() + end);
    if (c.length == 0 || start + static_cast<size_t>(c.length) != end ||
        char_class(char_class_table(), c.code) != CharClass::space) {
      break;
    }
    end = start;
  }
  return end;
}

}  // namespace mm
