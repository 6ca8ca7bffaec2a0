#include "lab/line_plot.h"

#include <gtest/gtest.h>

#include <cmath>

namespace mm {
namespace {

size_t count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t i = text.find(what); i != std::string::npos; i = text.find(what, i + 1)) n++;
  return n;
}

TEST(LinePlot, DrawsEverySeriesInsideTheFrame) {
  LinePlot plot{"Loss & more", "tokens", "loss", {{"a", {}}, {"b<", {}}}};
  for (int i = 0; i < 100; i++) {
    plot.series[0].points.emplace_back(i, 8.0 / (1 + i));
    plot.series[1].points.emplace_back(100 + i, i == 50 ? NAN : 2.0);
  }
  const std::string svg = render_svg(plot);
  EXPECT_EQ(count(svg, "<polyline"), 4u);
  EXPECT_NE(svg.find("Loss &amp; more"), std::string::npos);
  EXPECT_NE(svg.find("b&lt;"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_NE(svg.find("64.0,44.0 "), std::string::npos);  // the first, highest point: left end, top of the frame
}

TEST(LinePlot, NoPointsIsStillAPicture) {
  EXPECT_NE(render_svg({"t", "x", "y", {{"none", {}}}}).find("</svg>"), std::string::npos);
  EXPECT_NE(render_svg({"t", "x", "y", {{"one", {{3, 0}}}}}).find("</svg>"), std::string::npos);
}

TEST(Sparkline, FallsWithTheValues) {
  EXPECT_EQ(sparkline({8, 4, 1}, 3), "█▄▁");
  EXPECT_EQ(sparkline({8, 8, 1, 1}, 2), "█▁");
  EXPECT_EQ(sparkline({5, 5}, 10), "▁▁");
  EXPECT_EQ(sparkline({NAN}, 10), "");
  EXPECT_EQ(sparkline({}, 10), "");
}

}  // namespace
}  // namespace mm
