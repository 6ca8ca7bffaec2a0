#include "engine/think_splitter.h"

#include <gtest/gtest.h>

namespace mm {

static std::string show(const std::vector<ThinkSplitter::Part>& parts) {
  std::string out;
  for (const auto& p : parts) out += p.thinking ? "(" + p.text + ")" : p.text;
  return out;
}

// All cuts into two pushes, and byte by byte.
static void expect_split(bool inside, const std::string& text, const std::string& thought, const std::string& answer) {
  for (size_t cut = 0; cut <= text.size() + 1; cut++) {
    ThinkSplitter s(inside);
    std::vector<ThinkSplitter::Part> parts;
    const auto add = [&](std::vector<ThinkSplitter::Part> more) {
      parts.insert(parts.end(), more.begin(), more.end());
    };
    if (cut <= text.size()) {
      add(s.push(text.substr(0, cut)));
      add(s.push(text.substr(cut)));
    } else {
      for (const char c : text) add(s.push(std::string(1, c)));
    }
    add(s.flush());
    std::string t, a;
    for (const auto& p : parts) (p.thinking ? t : a) += p.text;
    EXPECT_EQ(t, thought) << cut;
    EXPECT_EQ(a, answer) << cut;
  }
}

TEST(ThinkSplitter, FindsThoughtsHoweverTheTextIsCut) {
  expect_split(false, "<think>\nfirst\nsecond\n</think>\n\nanswer\nmore\n", "first\nsecond", "answer\nmore\n");
  expect_split(true, "first\n</think>\n\nanswer", "first", "answer");
  expect_split(false, "<think>\n\n</think>\n\nanswer", "", "answer");
  expect_split(false, "a < b <thin> c", "", "a < b <thin> c");
  expect_split(true, "never closed\n</thi", "never closed\n</thi", "");
}

TEST(ThinkSplitter, TextThatIsNoTagIsGivenAtOnce) {
  ThinkSplitter s(false);
  EXPECT_EQ(show(s.push("hi")), "hi");
  EXPECT_EQ(show(s.push(" <")), " ");
  EXPECT_EQ(show(s.push("b>")), "<b>");
}

}  // namespace mm
