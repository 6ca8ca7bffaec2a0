// Regular expressions: against std::regex over all short texts and over random patterns; characters, anchors, refusals.
#include "grammar/regex.h"

#include <regex>

#include "grammar/grammar_test_util.h"

namespace mm {

namespace {

// A random expression over a, b and 0 in the syntax that std::regex has too.
std::string random_pattern(Rng& rng, int depth) {
  static const char* const atoms[] = {"a",   "b",   "0",      ".",   "[ab]",   "[^a]",
                                      "\\d", "\\w", "[^\\d]", "\\D", "[a-b0]", "(?:)"};
  static const char* const quantifiers[] = {"", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "{1,2}?"};
  std::string out;
  const uint64_t parts = 1 + rng.below(3);
  for (uint64_t i = 0; i < parts; i++) {
    std::string atom = atoms[rng.below(std::size(atoms))];
    if (depth > 0 && rng.below(3) == 0) {
      atom = random_pattern(rng, depth - 1);
      for (uint64_t n = rng.below(3); n > 0; n--) atom += fmt::format("|{}", random_pattern(rng, depth - 1));
      atom = fmt::format("{}{})", rng.below(2) == 0 ? "(" : "(?:", atom);
    }
    out += atom + quantifiers[rng.below(std::size(quantifiers))];
  }
  return out;
}

// libstdc++'s usual matcher takes exponential time for some of these.
std::regex peer_of(const std::string& pattern) {
  return std::regex(pattern, std::regex::ECMAScript | std::regex_constants::__polynomial);
}

const std::vector<std::string>& short_texts() {  // all of up to 5 characters of a, b, 0
  static const std::vector<std::string> texts = [] {
    std::vector<std::string> all{""};
    for (size_t i = 0; all[i].size() < 5; i++)
      for (const char c : {'a', 'b', '0'}) all.push_back(all[i] + c);
    return all;
  }();
  return texts;
}

}  // namespace

TEST(Regex, RandomPatternsMatchLikeStdRegex) {
  Rng rng{11, 0};
  size_t matched = 0, compared = 0;
  for (int round = 0; round < 400; round++) {
    const std::string pattern = random_pattern(rng, 2);
    const std::regex peer = peer_of(pattern);
    const auto grammar = Grammar::regex(pattern);
    for (const std::string& text : short_texts()) {
      const bool expected = std::regex_match(text, peer);
      matched += expected;
      compared++;
      ASSERT_EQ(matches(grammar, text), expected) << pattern << "  on \"" << text << '"';
    }
  }
  EXPECT_GT(matched, compared / 50);
  EXPECT_LT(matched, compared / 2);
}

// The same through JSON schema: `pattern` searches; with a length it becomes a deterministic automaton.
TEST(Regex, RandomPatternsSearchAndIntersectLikeStdRegex) {
  Rng rng{12, 0};
  size_t compared = 0;
  for (int round = 0; round < 250; round++) {
    const char* begin = rng.below(3) == 0 ? "^" : "";
    const std::string pattern = fmt::format("{}{}{}", begin, random_pattern(rng, 1), rng.below(3) == 0 ? "$" : "");
    const size_t min = rng.below(4), max = min + rng.below(4);
    const std::regex peer = peer_of(pattern);
    GrammarPtr free, bounded;
    const std::string why = error_of([&] { free = Grammar::json_schema({{"type", "string"}, {"pattern", pattern}}); });
    ASSERT_EQ(why, "") << pattern;
    const std::string none = error_of([&] {
      bounded =
          Grammar::json_schema({{"type", "string"}, {"pattern", pattern}, {"minLength", min}, {"maxLength", max}});
    });
    bool any = false;
    for (const std::string& text : short_texts()) {
      const bool expected = std::regex_search(text, peer), inside = text.size() >= min && text.size() <= max;
      ASSERT_EQ(matches(free, ordered_json(text).dump()), expected) << pattern << "  in \"" << text << '"';
      if (bounded) {
        ASSERT_EQ(matches(bounded, ordered_json(text).dump()), expected && inside)
            << pattern << "  in \"" << text << '"';
      }
      any |= expected && inside;
      compared++;
    }
    if (!bounded) {
      EXPECT_FALSE(any) << pattern << ": " << none;
    }
  }
  EXPECT_GT(compared, 50'000u);
}

TEST(Regex, WholeTextsInAndOut) {
  const std::string zhong = "\xE4\xB8\xAD", emoji = "\xF0\x9F\x98\x80", accent = "\xC3\xA9";
  const struct {
    std::string pattern;
    std::vector<std::string> in, out;
  } cases[] = {
      {"", {""}, {"a"}},
      {".",
       {"a", zhong, emoji, accent},
       {"", "ab", "\n", "\r", "\xE2\x80\xA8", "\xE4\xB8", "\x80", "\xFF", "\xED\xA0\x80"}},
      {".{2}", {zhong + emoji}, {zhong, "abc"}},
      {"[^a]", {"b", "\n", zhong, emoji}, {"a", "", "\xC3"}},
      {"[" + accent + "-" + zhong + "]", {accent, zhong, "\xE0\xA0\x80"}, {"a", emoji, "\xC3\xA8", "\xE4\xB8\xAE"}},
      {"[\\u4e00-\\u9fff]+", {zhong, zhong + zhong}, {"", "a", emoji}},
      {"\\u{1F600}|\\uD83D\\uDE01", {emoji, "\xF0\x9F\x98\x81"}, {"\xF0\x9F\x98\x82"}},
      {"\\s\\S", {" a", "\t" + zhong, "\xC2\xA0-", "\xE3\x80\x80x"}, {"a ", "  "}},
      {"\\W", {"-", zhong, accent}, {"a", "_", "5"}},
      {"[\\w-]+", {"a-b", "-"}, {"a b"}},
      {"[a\\]\\-b]+", {"a]-b"}, {"c"}},
      {"[.*+]+", {".*+"}, {"a"}},
      {"\\x41\\t\\.\\/\\-\\x2d|\\$", {"$", "A\t./--"}, {"A"}},
      {"(?<year>\\d{4})-(?P<m>\\d\\d)", {"2024-05"}, {"24-05"}},
      {"^a$|^b", {"a", "b"}, {"ab", "^a"}},
      {"(^a|b$)", {"a", "b"}, {"ab"}},
      {"^(?:(a|b)c)$", {"ac", "bc"}, {"a"}},
      {"(a*)*b", {"b", "aab"}, {"a"}},
      {"(a{2,3}){2}", {"aaaa", "aaaaaa"}, {"aaa", "aaaaaaa"}},
      {"(a|aa){50}",
       {std::string(50, 'a'), std::string(77, 'a'), std::string(100, 'a')},
       {std::string(49, 'a'), std::string(101, 'a')}},
      {"(a{0,100000}){1000}", {"", std::string(3000, 'a')}, {"b"}},
      {"(?:(?:a{2,3}b?){2,3}c?){1,2}",
       {"aaaa", "aabaaac", std::string(18, 'a'), "aaaaacaaaa"},
       {"aaa", std::string(19, 'a'), "aacaa"}},
      {"a{3,}", {"aaa", "aaaaaaaa"}, {"aa"}},
      {"a{0}", {""}, {"a"}},
      {"}]", {"}]"}, {"}"}},
  };
  for (const auto& c : cases) {
    const auto grammar = Grammar::regex(c.pattern);
    for (const auto& text : c.in) EXPECT_TRUE(matches(grammar, text)) << c.pattern << "  " << text;
    for (const auto& text : c.out) EXPECT_FALSE(matches(grammar, text)) << c.pattern << "  " << text;
  }
}

TEST(Regex, RefusedWithThePosition) {
  const struct {
    const char* pattern;
    int position;
  } cases[] = {
      {"ab(?=c)", 2}, {"(?!a)", 0}, {"(?<=a)b", 0}, {"(?<!a)b", 0}, {"(?i)a", 0},       {"(a)\\1", 3}, {"a\\b", 1},
      {"\\p{L}", 0},  {"a**", 2},   {"a*+", 2},     {"*a", 0},      {"a|+", 2},         {"a{2", 1},    {"a{,3}", 1},
      {"a{3,2}", 1},  {"(ab", 0},   {"ab)", 2},     {"[ab", 0},     {"x[]", 1},         {"[b-a]", 1},  {"[\\d-z]", 1},
      {"[[:a:]]", 1}, {"a\\", 1},   {"\\xZZ", 0},   {"\\uD800", 0}, {"\\u{110000}", 0}, {"^*", 1},     {"a{200000}", 2},
      {"(?P>x)", 0},  {"(?<a", 0},  {"\\07", 0},
  };
  for (const auto& c : cases) {
    const std::string error = error_of([&] { Grammar::regex(c.pattern, "guided_regex"); });
    EXPECT_TRUE(error.starts_with("guided_regex: ")) << c.pattern << "  " << error;
    EXPECT_NE(error.find(fmt::format("at character {}", c.position)), std::string::npos) << c.pattern << "  " << error;
  }
  for (const char* pattern : {"a^b", "a$b", "(a$)b", "(^a)+", "\xFF", "[^\\s\\S]"})
    EXPECT_NE(error_of([&] { Grammar::regex(pattern); }), "") << pattern;
}

}  // namespace mm
