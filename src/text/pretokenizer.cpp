#include "text/pretokenizer.h"

namespace mm {

inline CharClass PreTokenizer::class_at(const char* p, const char* end, int& length) const {
  const auto b0 = static_cast<uint8_t>(p[0]);
  if (b0 < 0x80) {
    length = 1;
    return char_class(table_, b0);
  }
  if (b0 >= 0xE1 && b0 <= 0xEC && end - p >= 3) {  // most of the world's three-byte characters, without special cases
    const auto b1 = static_cast<uint8_t>(p[1]), b2 = static_cast<uint8_t>(p[2]);
    if ((b1 & 0xC0) == 0x80 && (b2 & 0xC0) == 0x80) {
      length = 3;
      return char_class(table_, (b0 & 0x0Fu) << 12 | (b1 & 0x3Fu) << 6 | (b2 & 0x3Fu));
    }
  }
  const Utf8Char c = utf8_at(p, end);
  if (c.length == 0) {
    length = 1;
    return CharClass::other;
  }
  length = c.length;
  return char_class(table_, c.code);
}

inline const char* PreTokenizer::run_end(const char* p, const char* end, CharClass kind) const {
  int length = 0;
  while (p < end && class_at(p, end, length) == kind) p += length;
  return p;
}

static const char* contraction_end(const char* p, const char* end) {  // *p is an apostrophe
  if (end - p < 2) return nullptr;
  switch (p[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd': return p + 2;
    case 'r':
    case 'v': return end - p >= 3 && p[2] == 'e' ? p + 3 : nullptr;
    case 'l': return end - p >= 3 && p[2] == 'l' ? p + 3 : nullptr;
    default: return nullptr;
  }
}

const char* PreTokenizer::word_end(const char* p, const char* end) const {
  if (*p == '\'') {
    if (const char* e = contraction_end(p, end)) return e;
  }
  int length = 0;
  CharClass kind = class_at(p, end, length);
  if (kind != CharClass::space) return run_end(p + length, end, kind);
  if (*p == ' ' && p + 1 < end) {
    kind = class_at(p + 1, end, length);
    if (kind != CharClass::space) return run_end(p + 1 + length, end, kind);
  }
  // White space: all of it at the end of the segment, else all but its last character, but at least one.
  const char *last = p, *q = p;
  while (q < end && class_at(q, end, length) == CharClass::space) {
    last = q;
    q += length;
  }
  return q == end || last == p ? q : last;
}

}  // namespace mm
