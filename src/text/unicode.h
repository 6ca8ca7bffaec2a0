// UTF-8, character classes of the ByteLevel pattern, and the printable alphabet that byte-level vocabularies are
// written in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace mm {

// One character at p (p < end). Strict: overlong forms, surrogates and values past U+10FFFF are invalid.
struct Utf8Char {
  uint32_t code = 0;
  int length = 0;          // bytes; 0 if invalid
  bool truncated = false;  // invalid, but [p, end) is the beginning of a valid character
  int bad = 0;             // if invalid: bytes that one U+FFFD stands for (longest valid beginning, at least 1)
};
Utf8Char utf8_at(const char* p, const char* end);
void append_utf8(uint32_t code, std::string& out);

// Appends `bytes` with every invalid stretch replaced by U+FFFD (one for each longest valid beginning, as WHATWG and
// Rust do). Unless `final`, an unfinished character at the end is left alone. Returns the bytes consumed.
size_t append_lossy_utf8(std::string_view bytes, bool final, std::string& out);

enum class CharClass : uint8_t { other = 0, letter = 1, number = 2, space = 3 };

// Classes of all code points as HF tokenizers sees them (\p{L}, \p{N}, \s, the rest), four to a byte.
const uint8_t* char_class_table();
inline CharClass char_class(const uint8_t* table, uint32_t code) {
  return static_cast<CharClass>(table[code >> 2] >> ((code & 3) * 2) & 3);
}

// GPT-2's reversible map: each byte is written as one printable character.
std::string bytes_to_printable(std::string_view bytes);
// The bytes of a token as decoders see it: mapped back if every character is of the alphabet, else its own UTF-8.
std::string printable_to_bytes(std::string_view token);
uint32_t printable_of_byte(uint8_t byte);

}  // namespace mm
