// A line plot as an SVG file: a few lines of our own, so that a curve can be looked at in any browser.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace mm {

struct PlotSeries {
  std::string name;
  std::vector<std::pair<double, double>> points;  // in x order; points that are not finite are left out
};

struct LinePlot {
  std::string title, x_label, y_label;
  std::vector<PlotSeries> series;
  bool markers = false;  // a dot at each point
  bool log_x = false;    // points at or below zero are left out
};

// Each series is drawn thin as it is and thick smoothed. The y axis starts at zero.
std::string render_svg(const LinePlot& plot);

// "▇▅▃▂▁": `columns` characters, each the mean of its share of the values, the highest mean drawn highest. "" if there
// are no finite values.
std::string sparkline(const std::vector<double>& values, size_t columns);

}  // namespace mm
