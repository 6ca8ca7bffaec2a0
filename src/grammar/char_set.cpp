#include "grammar/char_set.h"

#include <algorithm>

#include "base/error.h"

namespace mm::grammar {

namespace {

constexpr uint32_t kSurrogatesFirst = 0xD800, kSurrogatesLast = 0xDFFF;

ByteSet bytes(unsigned first, unsigned last) {
  ByteSet set{};
  add_bytes(set, first, last);
  return set;
}

ByteSet bytes(std::string_view list) {
  ByteSet set{};
  for (const char c : list) add_bytes(set, static_cast<uint8_t>(c), static_cast<uint8_t>(c));
  return set;
}

// Byte sequences of equal length between two characters' encodings: split where a byte differs but what follows does
// not span all continuations.
void add_utf8_range(GraphBuilder& b, std::string_view first, std::string_view last, NodeId tail,
                    std::vector<NodeId>& out) {
  const auto f = static_cast<uint8_t>(first[0]), l = static_cast<uint8_t>(last[0]);
  if (first.size() == 1) {
    out.push_back(b.byte(bytes(f, l), tail));
    return;
  }
  const std::string low(first.size() - 1, '\x80'), high(first.size() - 1, '\xBF');
  const auto rest = [&](std::string_view from, std::string_view to) {
    std::vector<NodeId> parts;
    add_utf8_range(b, from, to, tail, parts);
    return b.alt(parts);
  };
  const std::string_view first_rest = first.substr(1), last_rest = last.substr(1);
  if (f == l) {
    out.push_back(b.byte(bytes(f, f), rest(first_rest, last_rest)));
    return;
  }
  unsigned whole_from = f, whole_to = l;
  if (first_rest != low) out.push_back(b.byte(bytes(f, f), rest(first_rest, high))), whole_from++;
  if (last_rest != high) out.push_back(b.byte(bytes(l, l), rest(low, last_rest))), whole_to--;
  if (whole_from <= whole_to) out.push_back(b.byte(bytes(whole_from, whole_to), rest(low, high)));
}

NodeId utf8_node(GraphBuilder& b, const CharSet& set) {
  std::vector<NodeId> out;
  constexpr uint32_t ends[] = {0x7F, 0x7FF, 0xFFFF, kMaxChar};  // last character of each length
  for (auto [first, last] : set.ranges()) {
    for (const uint32_t end : ends) {
      if (first > end || first > last) continue;
      const uint32_t stop = std::min(last, end);
      std::string from, to;
      append_utf8_char(first, from);
      append_utf8_char(stop, to);
      add_utf8_range(b, from, to, kEmpty, out);
      first = stop + 1;
    }
  }
  return b.alt(out);
}

const CharSet& json_escaped() {
  static const CharSet set = CharSet::of({{0, 0x1F}, {'"', '"'}, {'\\', '\\'}});
  return set;
}

NodeId json_node(GraphBuilder& b, const CharSet& set) {
  std::vector<NodeId> choices{utf8_node(b, set.without(json_escaped()))};
  for (const auto& [short_form, code] :
       {std::pair<char, uint32_t>{'"', '"'}, {'\\', '\\'}, {'b', 8}, {'t', 9}, {'n', 10}, {'f', 12}, {'r', 13}}) {
    if (set.contains(code)) choices.push_back(b.byte('\\', b.byte(short_form)));
  }
  const auto is_short = [](uint32_t c) { return c == 8 || c == 9 || c == 10 || c == 12 || c == 13; };
  for (const unsigned high : {0u, 1u}) {
    ByteSet low{};
    for (unsigned c = 0; c < 16; c++)
      if (set.contains(high * 16 + c) && !is_short(high * 16 + c)) {
        add_bytes(low, static_cast<uint8_t>("0123456789abcdef"[c]), static_cast<uint8_t>("0123456789abcdef"[c]));
      }
    choices.push_back(b.literal(high == 0 ? "\\u000" : "\\u001", b.byte(low)));
  }
  return b.alt(choices);
}

}  // namespace

CharSet CharSet::of(std::initializer_list<std::pair<uint32_t, uint32_t>> ranges) {
  CharSet set;
  for (const auto& [first, last] : ranges) set.add(first, last);
  return set;
}

void CharSet::add(uint32_t first, uint32_t last) {
  if (first <= kSurrogatesLast && last >= kSurrogatesFirst) {
    if (first < kSurrogatesFirst) add(first, kSurrogatesFirst - 1);
    if (last > kSurrogatesLast) add(kSurrogatesLast + 1, last);
    return;
  }
  auto at = std::lower_bound(ranges_.begin(), ranges_.end(), first,
                             [](const auto& range, uint32_t code) { return range.second + 1 < code; });
  auto end = at;
  for (; end != ranges_.end() && end->first <= last + 1; ++end) {
    first = std::min(first, end->first);
    last = std::max(last, end->second);
  }
  at = ranges_.erase(at, end);
  ranges_.insert(at, {first, last});
}

void CharSet::add(const CharSet& other) {
  for (const auto& [first, last] : other.ranges_) add(first, last);
}

CharSet CharSet::inverted() const {
  CharSet out;
  uint32_t from = 0;
  for (const auto& [first, last] : ranges_) {
    if (first > from) out.add(from, first - 1);
    from = last + 1;
  }
  if (from <= kMaxChar) out.add(from, kMaxChar);
  return out;
}

CharSet CharSet::without(const CharSet& other) const {
  CharSet rest = inverted();
  rest.add(other);
  return rest.inverted();
}

bool CharSet::contains(uint32_t code) const {
  const auto it = std::lower_bound(ranges_.begin(), ranges_.end(), code,
                                   [](const auto& range, uint32_t c) { return range.second < c; });
  return it != ranges_.end() && it->first <= code;
}

NodeId CharNodes::of(const CharSet& set) {
  const auto [it, fresh] = known_.try_emplace(set, kNever);
  if (fresh) {
    b_.spend(20 + 4 * set.ranges().size());
    it->second = encoding_ == CharEncoding::utf8 ? utf8_node(b_, set) : json_node(b_, set);
  }
  return it->second;
}

NodeId any_json_char(GraphBuilder& b) {
  const ByteSet hex = bytes("0123456789abcdefABCDEF");
  const NodeId hex2 = b.byte(hex, b.byte(hex)), hex3 = b.byte(hex, hex2);
  const NodeId low = b.literal("\\u", b.byte(bytes("dD"), b.byte(bytes("cdefCDEF"), hex2)));
  const NodeId unit = b.alt({
      b.byte(bytes("0123456789abcefABCEF"), hex3),
      b.byte(bytes("dD"), b.byte(bytes("01234567"), hex2)),
      b.byte(bytes("dD"), b.byte(bytes("89abAB"), b.byte(hex, b.byte(hex, low)))),
  });
  return b.alt({utf8_node(b, CharSet::all().without(json_escaped())), b.byte('\\', b.byte(bytes("\"\\/bfnrt"))),
                b.byte('\\', b.byte('u', unit))});
}

std::vector<uint32_t> decode_utf8(std::string_view text, const std::string& where) {
  std::vector<uint32_t> codes;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<uint8_t>(text[i]);
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xC2 && lead < 0xE0 ? 2
                          : lead >= 0xE0 && lead < 0xF0 ? 3
                          : lead >= 0xF0 && lead < 0xF5 ? 4
                                                        : 0;
    uint32_t code = length < 2 ? lead : lead & (0x7Fu >> length);
    bool valid = length > 0 && i + length <= text.size();
    for (size_t j = 1; valid && j < length; j++) {
      const auto c = static_cast<uint8_t>(text[i + j]);
      valid = (c & 0xC0) == 0x80;
      code = code << 6 | (c & 0x3F);
    }
    constexpr uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (!valid || code < smallest[length] || code > kMaxChar || (code >= kSurrogatesFirst && code <= kSurrogatesLast))
      throw Error(where, "valid UTF-8", fmt::format("byte 0x{:02X} at position {}", lead, i));
    codes.push_back(code);
    i += length;
  }
  return codes;
}

void append_utf8_char(uint32_t code, std::string& out) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 0x3F)), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  }
}

}  // namespace mm::grammar
