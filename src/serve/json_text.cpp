#include "serve/json_text.h"

#include <charconv>
#include <cmath>
#include <cstdint>

namespace mm {

// Bytes of the character at `at`, 0 if there is no valid one (RFC 3629: no overlong forms, no surrogates).
static size_t utf8_length(std::string_view s, size_t at) {
  const auto byte = [&](size_t i) { return i < s.size() ? static_cast<uint8_t>(s[i]) : uint8_t{0}; };
  const auto more = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
  const uint8_t a = byte(at), b = byte(at + 1);
  if (a < 0x80) return 1;
  if (a >= 0xC2 && a <= 0xDF) return more(at + 1) ? 2 : 0;
  if (a >= 0xE0 && a <= 0xEF) {
    if ((a == 0xE0 && b < 0xA0) || (a == 0xED && b > 0x9F)) return 0;
    return more(at + 1) && more(at + 2) ? 3 : 0;
  }
  if (a >= 0xF0 && a <= 0xF4) {
    if ((a == 0xF0 && b < 0x90) || (a == 0xF4 && b > 0x8F)) return 0;
    return more(at + 1) && more(at + 2) && more(at + 3) ? 4 : 0;
  }
  return 0;
}

static void append_escape(char c, std::string& out) {
  switch (c) {
    case '"': out += "\\\""; return;
    case '\\': out += "\\\\"; return;
    case '\n': out += "\\n"; return;
    case '\r': out += "\\r"; return;
    case '\t': out += "\\t"; return;
    default: break;
  }
  static constexpr char hex[] = "0123456789abcdef";
  out += "\\u00";
  out += hex[static_cast<uint8_t>(c) >> 4];
  out += hex[static_cast<uint8_t>(c) & 15];
}

void append_json_escaped(std::string_view text, std::string& out) {
  size_t begin = 0, at = 0;  // [begin, at): good as it stands
  while (at < text.size()) {
    const auto c = static_cast<uint8_t>(text[at]);
    if (c >= 0x20 && c < 0x80 && c != '"' && c != '\\') {
      at++;
      continue;
    }
    if (c >= 0x80) {
      if (const size_t n = utf8_length(text, at); n > 0) {
        at += n;
        continue;
      }
    }
    out += text.substr(begin, at - begin);
    if (c >= 0x80) out += "\xEF\xBF\xBD";
    else append_escape(text[at], out);
    begin = ++at;
  }
  out += text.substr(begin);
}

void append_json_string(std::string_view text, std::string& out) {
  out += '"';
  append_json_escaped(text, out);
  out += '"';
}

void append_json_number(double value, std::string& out) {
  if (!std::isfinite(value)) {
    out += "null";
    return;
  }
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  out.append(buffer, end);
}

std::string to_utf8(std::string_view bytes) {
  std::string out;
  for (size_t at = 0; at < bytes.size();) {
    const size_t n = utf8_length(bytes, at);
    if (n > 0) out += bytes.substr(at, n);
    else out += "\xEF\xBF\xBD";
    at += n > 0 ? n : 1;
  }
  return out;
}

}  // namespace mm
