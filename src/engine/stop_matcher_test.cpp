#include "engine/stop_matcher.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/rng.h"

namespace mm {

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher m({"###", "\nUser:"});
  EXPECT_EQ(m.push("hello #"), "hello ");
  EXPECT_EQ(m.push("1 ##"), "#1 ");
  EXPECT_EQ(m.push("\nUse"), "##");
  EXPECT_EQ(m.push("d"), "\nUsed");
  EXPECT_FALSE(m.matched());
  EXPECT_EQ(m.push(" x##"), " x");
  EXPECT_EQ(m.push("# gone"), "");
  EXPECT_TRUE(m.matched());
  EXPECT_EQ(m.push("more"), "");
  EXPECT_EQ(m.flush(), "");
}

TEST(StopMatcher, FlushGivesBackWhatNeverBecameOne) {
  StopMatcher m({"abcd"});
  EXPECT_EQ(m.push("xabc"), "x");
  EXPECT_EQ(m.flush(), "abc");
  StopMatcher none({});
  EXPECT_EQ(none.push("all"), "all");
}

TEST(StopMatcher, FirstCompleteWinsAndTheLongestOfThose) {
  StopMatcher m({"b", "abc"});
  EXPECT_EQ(m.push("xabc"), "xa");
  StopMatcher n({"b", "ab"});
  EXPECT_EQ(n.push("xab"), "x");
}

TEST(StopMatcher, CutsOfTheStreamChangeNothing) {
  const std::vector<std::string> stops{"aab", "bba", "abab"};
  for (uint64_t seed = 0; seed < 300; seed++) {
    Rng rng{seed, 0, 0};
    std::string text;
    for (int i = 0; i < 30; i++) text += "abc"[rng.below(seed % 2 ? 3 : 2)];
    StopMatcher whole(stops), cut(stops);
    std::string a = whole.push(text), b;
    a += whole.flush();
    for (size_t at = 0; at < text.size();) {
      const size_t n = 1 + rng.below(4);
      b += cut.push(std::string_view(text).substr(at, n));
      at += n;
    }
    b += cut.flush();
    EXPECT_EQ(a, b) << text;
    EXPECT_EQ(whole.matched(), cut.matched());
  }
}

TEST(StopMatcher, AnEmptyStopIsAnError) { EXPECT_THROW(StopMatcher({"a", ""}), Error); }

}  // namespace mm
