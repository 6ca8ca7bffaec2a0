#include "lab/line_plot.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"

namespace mm {

namespace {

constexpr double kWidth = 860, kHeight = 440, kLeft = 64, kRight = 20, kTop = 44, kBottom = 52;
constexpr std::array<const char*, 4> kColours{"#1f6feb", "#d1242f", "#1a7f37", "#8250df"};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '&') out += "&amp;";
    else out += c;
  }
  return out;
}

// 1, 2 or 5 times a power of ten, so that about five steps span the range.
double tick_step(double range) {
  const double raw = range / 5, power = std::pow(10, std::floor(std::log10(raw)));
  for (const double m : {1.0, 2.0, 5.0}) {
    if (m * power >= raw) return m * power;
  }
  return 10 * power;
}

std::string polyline(const std::vector<std::pair<double, double>>& points, const char* colour, double width,
                     double opacity) {
  std::string s =
      fmt::format("<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-opacity=\"{}\" points=\"", colour,
                  width, opacity);
  for (const auto& [x, y] : points) s += fmt::format("{:.1f},{:.1f} ", x, y);
  return s + "\"/>\n";
}

}  // namespace

std::string render_svg(const LinePlot& plot) {
  std::vector<PlotSeries> series = plot.series;
  double x_low = INFINITY, x_high = -INFINITY, y_high = 0;
  for (PlotSeries& s : series) {
    for (auto& p : s.points) p.first = plot.log_x ? std::log10(p.first) : p.first;
    std::erase_if(s.points, [](const auto& p) { return !std::isfinite(p.first) || !std::isfinite(p.second); });
    for (const auto& [x, y] : s.points) {
      x_low = std::min(x_low, x);
      x_high = std::max(x_high, x);
      y_high = std::max(y_high, y);
    }
  }
  if (!(x_low < x_high)) x_low = 0, x_high = std::max(1.0, std::isfinite(x_high) ? x_high : 1.0);
  if (y_high <= 0) y_high = 1;
  const auto px = [&](double x) { return kLeft + (x - x_low) / (x_high - x_low) * (kWidth - kLeft - kRight); };
  const auto py = [&](double y) { return kHeight - kBottom - y / y_high * (kHeight - kTop - kBottom); };

  std::string s = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
      "font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n",
      kWidth, kHeight);
  s += fmt::format("<text x=\"{}\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n", kLeft,
                   escaped(plot.title));
  const double y_step = tick_step(y_high), x_step = tick_step(x_high - x_low);
  for (double y = 0; y <= y_high; y += y_step) {
    s += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#d8dee4\"/>\n", kLeft,
                     kWidth - kRight, py(y), py(y));
    s += fmt::format("<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{:g}</text>\n", kLeft - 8, py(y) + 4, y);
  }
  for (double x = std::ceil(x_low / x_step) * x_step; x <= x_high; x += x_step) {
    s += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n", px(x), kHeight - kBottom + 18,
                     plot.log_x ? fmt::format("{:.3g}", std::pow(10, x)) : fmt::format("{:g}", x));
  }
  s += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n", (kLeft + kWidth - kRight) / 2,
                   kHeight - 12, escaped(plot.x_label));
  s += fmt::format("<text x=\"16\" y=\"{0}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {0})\">{1}</text>\n",
                   (kTop + kHeight - kBottom) / 2, escaped(plot.y_label));
  for (size_t i = 0; i < series.size(); i++) {
    const char* colour = kColours[i % kColours.size()];
    std::vector<std::pair<double, double>> raw, smooth;
    const double keep = 1 - 1 / std::clamp(static_cast<double>(series[i].points.size()) / 50, 1.0, 20.0);
    double mean = series[i].points.empty() ? 0 : series[i].points.front().second;
    for (const auto& [x, y] : series[i].points) {
      mean = keep * mean + (1 - keep) * y;
      raw.emplace_back(px(x), py(y));
      smooth.emplace_back(px(x), py(mean));
    }
    s += polyline(raw, colour, 1, 0.3) + polyline(smooth, colour, 2, 1);
    if (plot.markers) {
      for (const auto& [x, y] : raw)
        s += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"/>\n", x, y, colour);
    }
    s += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"{}\">{}</text>\n", kWidth - kRight - 8,
                     kTop + 16 + 18 * static_cast<double>(i), colour, escaped(series[i].name));
  }
  return s + "</svg>\n";
}

std::string sparkline(const std::vector<double>& values, size_t columns) {
  static constexpr std::array<const char*, 8> bars{"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  std::vector<double> finite;
  for (const double v : values) {
    if (std::isfinite(v)) finite.push_back(v);
  }
  columns = std::min(columns, finite.size());
  std::vector<double> means;
  for (size_t c = 0; c < columns; c++) {
    const size_t begin = c * finite.size() / columns, end = (c + 1) * finite.size() / columns;
    double sum = 0;
    for (size_t i = begin; i < end; i++) sum += finite[i];
    means.push_back(sum / static_cast<double>(end - begin));
  }
  if (means.empty()) return "";
  const auto [low, high] = std::minmax_element(means.begin(), means.end());
  std::string s;
  for (const double m : means) {
    const double level = *high > *low ? (m - *low) / (*high - *low) : 0;
    s += bars[static_cast<size_t>(std::lround(level * 7))];
  }
  return s;
}

}  // namespace mm
