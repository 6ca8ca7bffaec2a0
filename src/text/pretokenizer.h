// The ByteLevel pre-tokenizer of GPT-2 and MiniMind, as a hand-written scanner of the pattern
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// A byte that is not part of valid UTF-8 counts as one character outside L, N and \s.
#pragma once

#include <string_view>

#include "text/unicode.h"

namespace mm {

class PreTokenizer {
 public:
  PreTokenizer() : table_(char_class_table()) {}

  // End of the word that begins at p (p < end); [p, end) is a whole segment: the pattern's look-ahead sees its end.
  const char* word_end(const char* p, const char* end) const;

  // f(std::string_view word) for each word of the segment, in order; the words are the segment cut up.
  template <class F>
  void for_each_word(std::string_view segment, F&& f) const {
    const char *p = segment.data(), *const end = p + segment.size();
    while (p < end) {
      const char* e = word_end(p, end);
      f(std::string_view(p, static_cast<size_t>(e - p)));
      p = e;
    }
  }

 private:
  CharClass class_at(const char* p, const char* end, int& length) const;
  const char* run_end(const char* p, const char* end, CharClass kind) const;

  const uint8_t* table_;
};

}  // namespace mm
