#include "lab/calculator.h"

#include <gtest/gtest.h>

namespace mm {
namespace {

TEST(Calculator, Values) {
  EXPECT_EQ(calculate("1+2*3"), 7);
  EXPECT_EQ(calculate(" ( 1 + 2 ) * 3 "), 9);
  EXPECT_EQ(calculate("10-2-3"), 5);
  EXPECT_EQ(calculate("100/5/2"), 10);
  EXPECT_EQ(calculate("-3*-4"), 12);
  EXPECT_EQ(calculate("9223372036854775807"), INT64_MAX);
}

TEST(Calculator, Refusals) {
  for (const char* bad :
       {"", "1+", "+", "(1", "1)", "1 2", "a", "1/0", "7/2", "9223372036854775808", "9223372036854775807+1",
        "9999999999*9999999999", "0-9223372036854775807-2", "(0-9223372036854775807-1)/-1"}) {
    EXPECT_EQ(calculate(bad), std::nullopt) << bad;
  }
  EXPECT_EQ(calculate(std::string(100000, '(')), std::nullopt);
  EXPECT_EQ(calculate(std::string(100000, '-') + "1"), std::nullopt);
}

}  // namespace
}  // namespace mm
