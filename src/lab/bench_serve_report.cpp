// How the results of bench_serve are shown: a table, a report, plots.
#include <cmath>

#include "base/error.h"
#include "base/fs.h"
#include "lab/bench_serve.h"
#include "lab/line_plot.h"

namespace mm {

namespace {

double number(const ordered_json& level, const char* group, const char* key) {
  const auto it = level.find(group);
  if (it == level.end() || !it->is_object() || !it->contains(key) || !(*it)[key].is_number()) return NAN;
  return (*it)[key].get<double>();
}

// Three digits that count: 0.912, 12.3, 1234; "-" for nothing measured.
std::string ms(double v) {
  if (!std::isfinite(v)) return "-";
  return v < 10 ? fmt::format("{:.2f}", v) : v < 100 ? fmt::format("{:.1f}", v) : fmt::format("{:.0f}", v);
}

std::string one_digit(const ordered_json& v) { return v.is_number() ? fmt::format("{:.1f}", v.get<double>()) : "?"; }

std::string level_name(const ordered_json& level) {
  return level.contains("clients") ? fmt::format("{}", level["clients"].get<int64_t>())
                                   : fmt::format("{:g}/s", level["rate"].get<double>());
}

struct Column {
  const char* name;
  int width;
  std::string (*cell)(const ordered_json& level);
};

const std::vector<Column>& columns() {
  using J = const ordered_json&;
  static const std::vector<Column> all{
      {"clients", 8, [](J l) { return level_name(l); }},
      {"ok", 7, [](J l) { return fmt::format("{}", l["ok"].get<int64_t>()); }},
      {"failed", 7, [](J l) { return fmt::format("{}", l["failed"].get<int64_t>()); }},
      {"req/s", 8, [](J l) { return fmt::format("{:.1f}", l["requests_per_second"].get<double>()); }},
      {"out tok/s", 10, [](J l) { return fmt::format("{:.0f}", l["output_tokens_per_second"].get<double>()); }},
      {"all tok/s", 10, [](J l) { return fmt::format("{:.0f}", l["total_tokens_per_second"].get<double>()); }},
      {"TTFT p50", 9, [](J l) { return ms(number(l, "ttft_ms", "p50")); }},
      {"p90", 7, [](J l) { return ms(number(l, "ttft_ms", "p90")); }},
      {"p99", 7, [](J l) { return ms(number(l, "ttft_ms", "p99")); }},
      {"TPOT p50", 9, [](J l) { return ms(number(l, "tpot_ms", "p50")); }},
      {"p99", 7, [](J l) { return ms(number(l, "tpot_ms", "p99")); }},
      {"ITL p99", 8, [](J l) { return ms(number(l, "itl_ms", "p99")); }},
      {"E2E p50", 8, [](J l) { return ms(number(l, "e2e_ms", "p50")); }},
      {"p99", 7, [](J l) { return ms(number(l, "e2e_ms", "p99")); }},
      {"good req/s", 11,
       [](J l) {
         const double v = number(l, "goodput", "requests_per_second");
         return std::isfinite(v) ? fmt::format("{:.1f}", v) : std::string("-");
       }},
  };
  return all;
}

PlotSeries curve(const ordered_json& result, const std::string& name, const char* group, const char* key) {
  PlotSeries s{.name = name, .points = {}};
  for (const ordered_json& l : result["levels"])
    s.points.emplace_back(l["output_tokens_per_second"].get<double>(), number(l, group, key));
  return s;
}

LinePlot latency_plot(const ordered_json& result, const char* what, const char* group) {
  return {.title = fmt::format("{} over throughput, {}", what, result["model"].get<std::string>()),
          .x_label = "output tokens/s",
          .y_label = fmt::format("{}, ms", what),
          .series = {curve(result, "p50", group, "p50"), curve(result, "p99", group, "p99")},
          .markers = true};
}

LinePlot cdf_plot(const ordered_json& result) {
  LinePlot plot{.title = "Share of requests whose first token came within",
                .x_label = "ms (log)",
                .y_label = "share",
                .series = {},
                .log_x = true};
  for (const ordered_json& l : result["levels"]) {
    PlotSeries s{.name = level_name(l) + (l.contains("clients") ? " clients" : ""), .points = {}};
    const auto& quantiles = l["ttft_cdf_ms"];
    for (size_t i = 0; i < quantiles.size(); i++)
      s.points.emplace_back(quantiles[i].get<double>(),
                            static_cast<double>(i) / static_cast<double>(std::max<size_t>(quantiles.size() - 1, 1)));
    plot.series.push_back(std::move(s));
  }
  return plot;
}

}  // namespace

std::string serve_table_head() {
  std::string s;
  for (const Column& c : columns()) s += fmt::format("{:>{}}", c.name, c.width);
  return s + "   (ms)";
}

std::string serve_table_row(const ordered_json& level) {
  std::string s;
  for (const Column& c : columns()) s += fmt::format("{:>{}}", c.cell(level), c.width);
  for (const auto& [kind, n] : level["errors"].items()) s += fmt::format("  {} {}", n.get<int64_t>(), kind);
  if (level["client_busiest_worker"].get<double>() > 0.8) s += "  (this client was busy: more --workers)";
  return s;
}

void write_serve_report(const std::string& folder, const ordered_json& result, const std::string& command) {
  make_dirs(folder);
  write_file(path_join(folder, "results.json"), result.dump(1) + "\n");
  write_file(path_join(folder, "throughput_ttft.svg"),
             render_svg(latency_plot(result, "Time to first token", "ttft_ms")));
  write_file(path_join(folder, "throughput_tpot.svg"), render_svg(latency_plot(result, "Time a token", "tpot_ms")));
  write_file(path_join(folder, "ttft_cdf.svg"), render_svg(cdf_plot(result)));

  std::string md = fmt::format("# Load on {}\n\n`{}`\n\n", result["url"].get<std::string>(), command);
  md += "| setting | |\n|---|---|\n";
  for (const auto& [key, value] : result.items()) {
    if (key != "levels" && key != "bench")
      md += fmt::format("| {} | {} |\n", key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  md +=
      "\nTimes in ms. TTFT: from the moment a request was due to its first text. TPOT: the mean time of a token after "
      "the "
      "first. ITL: between two events of a stream. E2E: from due to the end. Levels with \"/s\" are open loops.\n\n|";
  for (const Column& c : columns()) md += fmt::format(" {} |", c.name);
  md += "\n|";
  for (size_t i = 0; i < columns().size(); i++) md += "---:|";
  md += "\n";
  std::string notes;
  for (const ordered_json& l : result["levels"]) {
    md += "|";
    for (const Column& c : columns()) md += fmt::format(" {} |", c.cell(l));
    md += "\n";
    if (!l["errors"].empty()) notes += fmt::format("- {}: errors {}\n", level_name(l), l["errors"].dump());
    notes +=
        fmt::format("- {}: tokens from {}; prompt {} tokens, output {} tokens a request; client at {:.0f}% of a core\n",
                    level_name(l), l["tokens_from"].get<std::string>(), one_digit(l["prompt_tokens_mean"]),
                    one_digit(l["output_tokens_mean"]), 100 * l["client_busiest_worker"].get<double>());
  }
  md += "\n" + notes + "\n![](throughput_ttft.svg)\n![](throughput_tpot.svg)\n![](ttft_cdf.svg)\n";
  write_file(path_join(folder, "report.md"), md);
}

}  // namespace mm
