#include "lab/soak.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace mm {
namespace {

TEST(Soak, ReadsMetrics) {
  const auto m = parse_metrics(
      "# HELP a b 5\n# TYPE a counter\na 12\nb{route=\"/v1/x y\",code=\"200\"} 3.5e2\nnonsense\nc NaNsense x\n\nd -1");
  EXPECT_EQ(m.size(), 3u);
  EXPECT_EQ(m.at("a"), 12);
  EXPECT_EQ(m.at("b{route=\"/v1/x y\",code=\"200\"}"), 350);
  EXPECT_EQ(m.at("d"), -1);
}

TEST(Soak, SlopeOfALine) {
  EXPECT_DOUBLE_EQ(slope({{1, 10}, {2, 12}, {3, 14}}), 2);
  EXPECT_DOUBLE_EQ(slope({{0, 5}, {1, 7}, {2, 5}, {3, 7}}), 0.4);
  EXPECT_EQ(slope({{4, 4}}), 0);
  EXPECT_EQ(slope({}), 0);
}

TEST(Soak, NoServerIsAnError) {
  SoakOptions o{.target = load_target_from_url("http://127.0.0.1:1", "--url"), .seconds = 1};
  EXPECT_THROW(run_soak(o), Error);
}

}  // namespace
}  // namespace mm
