// minimind plot: the curves of one or more runs as an SVG that any browser shows.
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"
#include "cli/command.h"
#include "lab/line_plot.h"

namespace mm {

namespace {

struct PlotFlags {
  std::vector<std::string> runs, metrics{"train/loss", "valid/nll"};
  std::string output;
  bool overwrite = false;
};

// One series a metric that occurs in RUN/metrics.jsonl.
void read_series(const std::string& run, const std::vector<std::string>& metrics, bool name_run, LinePlot& plot) {
  const std::string path = path_join(run, "metrics.jsonl");
  const std::string text = read_file(path);
  std::vector<PlotSeries> series(metrics.size());
  for (size_t i = 0; i < metrics.size(); i++) {
    series[i].name = name_run ? std::filesystem::path(run).filename().string() + " " + metrics[i] : metrics[i];
  }
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string where = fmt::format("{}:{}", path, ++number);
    const ordered_json line = parse_json(std::string_view(text).substr(begin, end - begin), where);
    const auto step = json_get<double>(line, "step", where);
    for (size_t i = 0; i < metrics.size(); i++) {
      const auto value = line.find(metrics[i]);
      if (value != line.end() && value->is_number()) series[i].points.emplace_back(step, value->get<double>());
    }
    begin = end + 1;
  }
  for (PlotSeries& s : series) {
    if (!s.points.empty()) plot.series.push_back(std::move(s));
  }
}

void plot_runs(const PlotFlags& f, const Globals& globals) {
  if (!f.overwrite && file_exists(f.output))
    throw Error(f.output, "a new file", "one that exists", "choose another or pass --overwrite");
  LinePlot plot{.title = fmt::format("{}", f.runs.size() == 1 ? f.runs[0] : "runs"),
                .x_label = "optimizer step",
                .y_label = f.metrics.size() == 1 ? f.metrics[0] : "nats a token"};
  for (const std::string& run : f.runs) read_series(run, f.metrics, f.runs.size() > 1, plot);
  if (plot.series.empty())
    throw Error("--metric", "one that metrics.jsonl holds", "none of those given", "look at the keys of its lines");
  write_file(f.output, render_svg(plot));
  print_result(globals, {{"output", f.output}, {"series", plot.series.size()}});
}

}  // namespace

void add_plot_command(CLI::App& app, Globals& globals) {
  const auto f = std::make_shared<PlotFlags>();
  CLI::App* c = app.add_subcommand("plot",
                                   "Draw the curves of runs as an SVG\n"
                                   "  minimind plot runs/pretrain --output loss.svg\n"
                                   "  minimind plot runs/a runs/b --metric train/loss --output compare.svg");
  c->add_option("runs", f->runs, "Run folders (each with metrics.jsonl)")->required();
  c->add_option("--metric", f->metrics, "Keys of metrics.jsonl to draw");
  c->add_option("--output", f->output, "SVG file to write")->required();
  c->add_flag("--overwrite", f->overwrite, "Replace an existing file");
  add_common_flags(c, globals);
  c->callback([f, &globals] { plot_runs(*f, globals); });
}

}  // namespace mm
