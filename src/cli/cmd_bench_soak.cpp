// minimind bench soak: a long overload of `minimind serve`, part of it hostile, with a verdict.
#include "base/error.h"
#include "base/fs.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "lab/line_plot.h"
#include "lab/soak.h"

namespace mm {

static void write_soak(const std::string& folder, const ordered_json& result) {
  make_dirs(folder);
  write_file(path_join(folder, "results.json"), result.dump(1) + "\n");
  const ordered_json& samples = result["samples"];
  if (!samples.contains("rss_mb")) return;
  PlotSeries rss{.name = "resident memory", .points = {}};
  for (size_t i = 0; i < samples["rss_mb"].size(); i++) {
    if (samples["rss_mb"][i].is_number())
      rss.points.emplace_back(samples["seconds"][i].get<double>(), samples["rss_mb"][i].get<double>());
  }
  write_file(
      path_join(folder, "memory.svg"),
      render_svg(
          {.title = "The server's memory under overload", .x_label = "seconds", .y_label = "MB", .series = {rss}}));
}

void add_bench_soak_command(CLI::App& group, Globals& globals) {
  struct Flags {
    std::string url = "http://127.0.0.1:8000", out;
    bool overwrite = false;
    SoakOptions soak;
  };
  const auto f = std::make_shared<Flags>();
  SoakOptions& s = f->soak;
  CLI::App* c = group.add_subcommand(
      "soak",
      "A long run against `minimind serve` at twice what it can take, a tenth of it hostile; exit code 1 if a check "
      "fails\n"
      "  minimind bench soak --url http://127.0.0.1:8000 --pid $(pgrep -f 'minimind serve') --seconds 1800 --out soak");
  c->add_option("--url", f->url, "The server");
  c->add_option("--api-key", s.target.api_key, "Sent as bearer token")->envname("OPENAI_API_KEY");
  c->add_option("--pid", s.pid, "The server's process, to watch its memory")->check(above_zero());
  c->add_option("--seconds", s.seconds, "Length of the run")->check(above_zero());
  c->add_option("--capacity", s.capacity, "Requests a second that it can take (0: measured first)")->check(at_least(0));
  c->add_option("--overload", s.overload, "Times the capacity to offer")->check(above_zero());
  c->add_option("--hostile", s.hostile,
                "Share of bad JSON, prompts of 1 MB, slow readers, dropped sockets and cancelled streams")
      ->check(in_range(0.0, 1.0));
  c->add_option("--max-tokens", s.max_tokens, "Of a prompt (in words) and of an answer; the median of both is 64")
      ->check(above_zero());
  c->add_option("--warm-seconds", s.warm_seconds,
                "Before memory must be flat: the KV pool fills (0: a quarter of the run)")
      ->check(at_least(0));
  c->add_option("--seed", s.seed, "Of the traffic");
  c->add_option("--out", f->out, "New folder for results.json and a plot of the memory");
  c->add_flag("--overwrite", f->overwrite, "Write into a folder that exists");
  add_common_flags(c, globals);
  c->callback([f, &globals] {
    if (!f->out.empty()) require_new_dir(f->out, f->overwrite);
    const std::string key = f->soak.target.api_key;
    f->soak.target = load_target_from_url(f->url, "--url");
    f->soak.target.api_key = key;
    const ordered_json r = run_soak(f->soak);
    if (!f->out.empty()) write_soak(f->out, r);
    if (globals.json) {
      print_result(globals, r);
    } else {
      print_line(fmt::format("{:.0f} s at {:.1f} requests/s, {:.1f} times the capacity of {:.1f}",
                             r["seconds"].get<double>(), r["rate"].get<double>(), f->soak.overload,
                             r["capacity"].get<double>()));
      for (const auto& [kind, outcomes] : r["kinds"].items())
        print_line(fmt::format("  {:<18} {}", kind, outcomes.dump()));
      for (const ordered_json& check : r["checks"]) {
        print_line(fmt::format("{}  {}: {}", check["passed"].get<bool>() ? "ok    " : "FAILED",
                               check["check"].get<std::string>(), check["found"].get<std::string>()));
      }
    }
    if (!r["passed"].get<bool>()) throw CLI::RuntimeError(1);
  });
}

}  // namespace mm
