#include "text/unicode.h"

#include <array>
#include <cstring>
#include <vector>

namespace mm {

namespace {

constexpr uint32_t kCodes = 0x110000;

struct Run {
  uint32_t first;
  CharClass kind;
};
constexpr CharClass O = CharClass::other, L = CharClass::letter, N = CharClass::number, S = CharClass::space;
constexpr Run kRuns[] = {
#include "text/unicode_ranges.inc"
};

std::vector<uint8_t> make_class_table() {
  std::vector<uint8_t> table(kCodes / 4, 0);
  for (size_t r = 0; r < std::size(kRuns); r++) {
    uint32_t code = kRuns[r].first;
    const uint32_t stop = r + 1 < std::size(kRuns) ? kRuns[r + 1].first : kCodes;
    const auto kind = static_cast<unsigned>(kRuns[r].kind);
    if (kind == 0) continue;
    for (; code < stop && code % 4 != 0; code++) table[code / 4] |= static_cast<uint8_t>(kind << (code % 4 * 2));
    const uint32_t whole = stop > code ? (stop - code) / 4 : 0;
    if (whole > 0) std::memset(table.data() + code / 4, static_cast<int>(kind * 0x55), whole);
    for (code += whole * 4; code < stop; code++) table[code / 4] |= static_cast<uint8_t>(kind << (code % 4 * 2));
  }
  return table;
}

struct ByteAlphabet {
  std::array<uint32_t, 256> code{};    // byte -> character
  std::array<int16_t, 512> byte_of{};  // character -> byte or -1
  ByteAlphabet() {
    byte_of.fill(-1);
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; b++) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      code[b] = printable ? b : next++;
      byte_of[code[b]] = static_cast<int16_t>(b);
    }
  }
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet a;
  return a;
}

}  // namespace

Utf8Char utf8_at(const char* p, const char* end) {
  const auto* s = reinterpret_cast<const uint8_t*>(p);
  const ptrdiff_t n = end - p;
  Utf8Char c;
  const uint8_t b = s[0];
  if (b < 0x80) return {b, 1, false, 0};
  // The first continuation byte is narrower after E0, ED, F0 and F4: no overlong forms, surrogates or values too large.
  int need = 0;
  uint8_t low = 0x80, high = 0xBF;
  if (b >= 0xC2 && b <= 0xDF) {
    need = 1;
    c.code = b & 0x1Fu;
  } else if (b >= 0xE0 && b <= 0xEF) {
    need = 2;
    c.code = b & 0x0Fu;
    if (b == 0xE0) low = 0xA0;
    if (b == 0xED) high = 0x9F;
  } else if (b >= 0xF0 && b <= 0xF4) {
    need = 3;
    c.code = b & 0x07u;
    if (b == 0xF0) low = 0x90;
    if (b == 0xF4) high = 0x8F;
  } else {
    c.bad = 1;
    return c;
  }
  for (int i = 1; i <= need; i++) {
    if (i >= n) {
      c.truncated = true;
      c.bad = i;
      return c;
    }
    if (s[i] < low || s[i] > high) {
      c.bad = i;
      return c;
    }
    c.code = c.code << 6 | (s[i] & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  c.length = need + 1;
  return c;
}

void append_utf8(uint32_t code, std::string& out) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

size_t append_lossy_utf8(std::string_view bytes, bool final, std::string& out) {
  const char *p = bytes.data(), *const end = p + bytes.size();
  const char* good = p;  // [good, p) is valid and not yet copied
  while (p < end) {
    if (static_cast<uint8_t>(*p) < 0x80) {
      p++;
      continue;
    }
    const Utf8Char c = utf8_at(p, end);
    if (c.length > 0) {
      p += c.length;
      continue;
    }
    out.append(good, p);
    good = p;
    if (c.truncated && !final) break;
    out += "\xEF\xBF\xBD";
    p += c.bad;
    good = p;
  }
  out.append(good, p);
  return static_cast<size_t>(p - bytes.data());
}

const uint8_t* char_class_table() {
  static const std::vector<uint8_t> table = make_class_table();
  return table.data();
}

uint32_t printable_of_byte(uint8_t byte) { return alphabet().code[byte]; }

std::string bytes_to_printable(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const char b : bytes) append_utf8(printable_of_byte(static_cast<uint8_t>(b)), out);
  return out;
}

std::string printable_to_bytes(std::string_view token) {
  std::string out;
  const char *p = token.data(), *const end = p + token.size();
  while (p < end) {
    const Utf8Char c = utf8_at(p, end);
    if (c.length == 0 || c.code >= alphabet().byte_of.size() || alphabet().byte_of[c.code] < 0)
      return std::string(token);
    out += static_cast<char>(alphabet().byte_of[c.code]);
    p += c.length;
  }
  return out;
}

}  // namespace mm
