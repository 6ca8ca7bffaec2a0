#include "grammar/regex.h"

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace mm::grammar {

namespace {

constexpr size_t kMaxPattern = 20'000;  // characters
constexpr int kMaxGroups = 100;         // nested
constexpr int32_t kMaxCount = 100'000;  // of one quantifier

const CharSet& digits() {
  static const CharSet set = CharSet::of({{'0', '9'}});
  return set;
}
const CharSet& word() {
  static const CharSet set = CharSet::of({{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}});
  return set;
}
const CharSet& space() {
  static const CharSet set = CharSet::of({{9, 13},
                                          {' ', ' '},
                                          {0xA0, 0xA0},
                                          {0x1680, 0x1680},
                                          {0x2000, 0x200A},
                                          {0x2028, 0x2029},
                                          {0x202F, 0x202F},
                                          {0x205F, 0x205F},
                                          {0x3000, 0x3000},
                                          {0xFEFF, 0xFEFF}});
  return set;
}
const CharSet& any_but_line_ends() {
  static const CharSet set = CharSet::of({{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}}).inverted();
  return set;
}

Regex make_chars(CharSet set) { return {.kind = Regex::Kind::chars, .chars = std::move(set)}; }

class Parser {
 public:
  Parser(std::string_view pattern, const std::string& where) : where_(where), text_(decode_utf8(pattern, where)) {
    if (text_.size() > kMaxPattern)
      throw Error(where_, fmt::format("a pattern of at most {} characters", kMaxPattern), std::to_string(text_.size()));
  }

  Regex parse() {
    Regex all = alternatives();
    if (at_ < text_.size())
      refuse("the end of the pattern or an opening bracket before", at_, "\\) stands for the character");
    return all;
  }

 private:
  bool more() const { return at_ < text_.size(); }
  bool next_is(char c) const { return more() && text_[at_] == static_cast<uint32_t>(c); }
  bool take(char c) { return next_is(c) && ++at_; }

  std::string shown(size_t from) const {
    if (from >= text_.size()) return "the end";
    std::string out;
    for (size_t i = from; i < std::min(from + 12, text_.size()); i++) {
      if (text_[i] < 0x20) out += fmt::format("\\x{:02x}", text_[i]);
      else append_utf8_char(text_[i], out);
    }
    return "\"" + out + "\"";
  }
  [[noreturn]] void refuse(const std::string& expected, size_t position, const std::string& todo = "") const {
    throw Error(where_, expected, fmt::format("{} at character {}", shown(position), position), todo);
  }

  Regex alternatives() {
    if (++depth_ > kMaxGroups) refuse(fmt::format("groups nested at most {} deep", kMaxGroups), at_);
    Regex out{.kind = Regex::Kind::alternate, .position = at_};
    do out.parts.push_back(sequence());
    while (take('|'));
    depth_--;
    return out.parts.size() == 1 ? std::move(out.parts[0]) : out;
  }

  Regex sequence() {
    Regex out{.kind = Regex::Kind::concat, .position = at_};
    while (more() && !next_is('|') && !next_is(')')) out.parts.push_back(quantified());
    return out;
  }

  Regex quantified() {
    const size_t start = at_;
    Regex atom = this->atom();
    const bool is_anchor = atom.kind == Regex::Kind::begin || atom.kind == Regex::Kind::end;
    int32_t min = 0, max = 0;
    const size_t quantifier = at_;
    if (!quantity(min, max)) return atom;
    if (is_anchor) refuse("no quantifier after ^ or $", quantifier);
    take('?');
    int32_t again_min = 0, again_max = 0;
    const size_t again = at_;
    if (quantity(again_min, again_max)) refuse("one quantifier", again, "possessive quantifiers are not supported");
    Regex out{.kind = Regex::Kind::repeat, .min = min, .max = max, .position = start};
    out.parts.push_back(std::move(atom));
    return out;
  }

  bool quantity(int32_t& min, int32_t& max) {
    if (take('*')) return min = 0, max = kUnbounded, true;
    if (take('+')) return min = 1, max = kUnbounded, true;
    if (take('?')) return min = 0, max = 1, true;
    if (!next_is('{')) return false;
    const size_t start = at_++;
    const auto first = number(), second = take(',') ? number() : first;
    const bool open = text_[at_ - 1] == ',';
    if (!first || !take('}')) refuse("a quantifier {n}, {n,} or {n,m}", start, "\\{ stands for the character");
    min = *first;
    max = open ? kUnbounded : *second;
    if (min > max) refuse("a quantifier {n,m} with n <= m", start);
    return true;
  }

  std::optional<int32_t> number() {
    const size_t start = at_;
    int32_t value = 0;
    for (; more() && text_[at_] >= '0' && text_[at_] <= '9'; at_++) {
      value = value * 10 + static_cast<int32_t>(text_[at_] - '0');
      if (value > kMaxCount) refuse(fmt::format("a repetition of at most {}", kMaxCount), start);
    }
    return at_ == start ? std::nullopt : std::optional(value);
  }

  Regex atom() {
    const size_t start = at_;
    const uint32_t c = text_[at_++];
    switch (c) {
      case '^': return {.kind = Regex::Kind::begin, .position = start};
      case '$': return {.kind = Regex::Kind::end, .position = start};
      case '.': return make_chars(any_but_line_ends());
      case '[': return make_chars(char_class());
      case '(': return group();
      case '\\': return make_chars(escape(start, false));
      case '*':
      case '+':
      case '?':
      case '{': refuse("something to repeat", start, "a backslash before it makes it a character");
      default: return make_chars(CharSet::of({{c, c}}));
    }
  }

  Regex group() {
    const size_t start = at_ - 1;
    if (take('?')) {
      const bool python = take('P');
      if (!python && take(':')) {
      } else if (next_is('<') && at_ + 1 < text_.size() && text_[at_ + 1] != '=' && text_[at_ + 1] != '!') {
        while (more() && !next_is('>')) at_++;
        if (!take('>')) refuse("the end > of a group's name", start);
      } else {
        refuse("a group ( ), (?: ) or (?<name> )", start, "look-around and flags are not supported");
      }
    }
    Regex inner = alternatives();
    if (!take(')')) refuse("a group that ends with )", start);
    // A group of its own, so that a quantifier and anchors see it as one part.
    Regex out{.kind = Regex::Kind::concat, .position = start};
    out.parts.push_back(std::move(inner));
    return out;
  }

  CharSet char_class() {
    const size_t start = at_ - 1;
    const bool negated = take('^');
    if (next_is(']')) refuse("a class with characters", start, "\\] stands for the character");
    CharSet set;
    while (!next_is(']')) {
      if (!more()) refuse("a class that ends with ]", start);
      if (next_is('[') && at_ + 1 < text_.size() &&
          (text_[at_ + 1] == ':' || text_[at_ + 1] == '.' || text_[at_ + 1] == '='))
        refuse("characters, ranges and escapes in a class", at_,
               "POSIX classes are not supported; \\[ is the character");
      const size_t low_at = at_;
      const CharSet low = class_member();
      if (!next_is('-') || at_ + 1 >= text_.size() || text_[at_ + 1] == ']') {
        set.add(low);
        continue;
      }
      at_++;
      const CharSet high = class_member();
      const auto single = [](const CharSet& s) {
        return s.ranges().size() == 1 && s.ranges()[0].first == s.ranges()[0].second;
      };
      if (!single(low) || !single(high) || low.ranges()[0].first > high.ranges()[0].first)
        refuse("a range from a lower to a higher character", low_at, "\\- stands for the character");
      set.add(low.ranges()[0].first, high.ranges()[0].first);
    }
    at_++;
    if (negated) set = set.inverted();
    if (set.empty()) refuse("a class with characters", start);
    return set;
  }

  CharSet class_member() {
    const size_t start = at_;
    const uint32_t c = text_[at_++];
    return c == '\\' ? escape(start, true) : CharSet::of({{c, c}});
  }

  // After the backslash at `start`.
  CharSet escape(size_t start, bool in_class) {
    if (!more()) refuse("a character after the backslash", start);
    const uint32_t c = text_[at_++];
    const auto one = [](uint32_t code) { return CharSet::of({{code, code}}); };
    switch (c) {
      case 'd': return digits();
      case 'D': return digits().inverted();
      case 'w': return word();
      case 'W': return word().inverted();
      case 's': return space();
      case 'S': return space().inverted();
      case 't': return one('\t');
      case 'n': return one('\n');
      case 'v': return one('\v');
      case 'f': return one('\f');
      case 'r': return one('\r');
      case 'b':
        if (in_class) return one('\b');
        break;
      case '0':
        if (!more() || text_[at_] < '0' || text_[at_] > '9') return one(0);
        break;
      case 'x': return one(checked(hex(2, start), start));
      case 'u': {
        if (take('{')) {
          uint32_t code = 0;
          size_t n = 0;
          for (; more() && !next_is('}'); n++) code = std::min(code * 16 + hex(1, start), kMaxChar + 1);
          if (n == 0 || !take('}')) refuse("\\u{ and a code point in hexadecimal }", start);
          return one(checked(code, start));
        }
        uint32_t code = hex(4, start);
        if (code >= 0xD800 && code < 0xDC00 && next_is('\\') && at_ + 1 < text_.size() && text_[at_ + 1] == 'u') {
          at_ += 2;
          const uint32_t low = hex(4, start);
          if (low < 0xDC00 || low > 0xDFFF) refuse("a pair of surrogates", start);
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        return one(checked(code, start));
      }
      default:
        if (c >= 0x80 || !(word().contains(c))) return one(c);
    }
    refuse("an escape that is supported", start, "back-references, word boundaries and \\p are not");
  }

  uint32_t checked(uint32_t code, size_t start) const {
    if (code > kMaxChar || (code >= 0xD800 && code <= 0xDFFF)) refuse("a Unicode character", start);
    return code;
  }

  uint32_t hex(int n, size_t start) {
    uint32_t value = 0;
    for (int i = 0; i < n; i++, at_++) {
      const uint32_t c = more() ? text_[at_] : 0;
      if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
      else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f') value = value * 16 + ((c | 0x20) - 'a' + 10);
      else refuse("hexadecimal digits", start);
    }
    return value;
  }

  const std::string& where_;
  std::vector<uint32_t> text_;
  size_t at_ = 0;
  int depth_ = 0;
};

bool has_anchor(const Regex& r) {
  if (r.kind == Regex::Kind::begin || r.kind == Regex::Kind::end) return true;
  return std::any_of(r.parts.begin(), r.parts.end(), has_anchor);
}

// Takes ^ and $ off the ends of every alternative and puts "any text" where they are missing. `begun`, `ended`: that
// end is already bound.
Regex bind_ends(Regex r, bool begun, bool ended, const std::string& where) {
  if (r.kind == Regex::Kind::alternate) {
    for (Regex& part : r.parts) part = bind_ends(std::move(part), begun, ended, where);
    return r;
  }
  const size_t position = r.position;
  std::vector<Regex> parts;
  if (r.kind == Regex::Kind::concat) parts = std::move(r.parts);
  else parts.push_back(std::move(r));
  size_t first = 0, last = parts.size();
  for (; first < last && parts[first].kind == Regex::Kind::begin; first++) begun = true;
  for (; last > first && parts[last - 1].kind == Regex::Kind::end; last--) ended = true;
  parts = {std::make_move_iterator(parts.begin() + static_cast<std::ptrdiff_t>(first)),
           std::make_move_iterator(parts.begin() + static_cast<std::ptrdiff_t>(last))};
  const auto is_group = [](const Regex& p) {
    return p.kind == Regex::Kind::concat || p.kind == Regex::Kind::alternate;
  };
  if (parts.size() == 1 && is_group(parts[0])) return bind_ends(std::move(parts[0]), begun, ended, where);
  for (const Regex& part : parts) {
    if (has_anchor(part))
      throw Error(where, "^ at the beginning and $ at the end of an alternative",
                  fmt::format("one inside the part at character {}", part.position));
  }
  Regex any{.kind = Regex::Kind::repeat, .min = 0, .max = kUnbounded};
  any.parts.push_back(make_chars(CharSet::all()));
  Regex out{.kind = Regex::Kind::concat, .position = position};
  if (!begun) out.parts.push_back(any);
  for (Regex& part : parts) out.parts.push_back(std::move(part));
  if (!ended) out.parts.push_back(std::move(any));
  return out;
}

}  // namespace

Regex parse_regex(std::string_view pattern, RegexMatch match, const std::string& where) {
  const bool whole = match == RegexMatch::whole;
  return bind_ends(Parser(pattern, where).parse(), whole, whole, where);
}

NodeId regex_node(CharNodes& chars, const Regex& r) {
  GraphBuilder& b = chars.builder();
  switch (r.kind) {
    case Regex::Kind::chars: return chars.of(r.chars);
    case Regex::Kind::alternate: {
      std::vector<NodeId> choices;
      for (const Regex& part : r.parts) choices.push_back(regex_node(chars, part));
      return b.alt(choices);
    }
    case Regex::Kind::repeat: return b.repeat(regex_node(chars, r.parts[0]), r.min, r.max);
    case Regex::Kind::concat: {
      NodeId all = kEmpty;
      for (size_t i = r.parts.size(); i-- > 0;) all = b.seq(regex_node(chars, r.parts[i]), all);
      return all;
    }
    case Regex::Kind::begin:
    case Regex::Kind::end: break;
  }
  MM_CHECK(false, "anchors are taken off by parse_regex");
}

}  // namespace mm::grammar
