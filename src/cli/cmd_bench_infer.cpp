// minimind bench decode|prefill: how fast the engine is here.
#include <fmt/ranges.h>

#include "base/error.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "lab/bench_infer.h"

namespace mm {

namespace {

struct InferFlags {
  std::string model, preset, draft_model;
  std::vector<std::string> weights, kv;
  InferBenchOptions bench;
  DeviceOptions device;
};

void run_bench(InferFlags& f, const Globals& globals, bool decode) {
  if (f.model.empty() == f.preset.empty())
    throw Error("--model, --preset", "one of them", f.model.empty() ? "none" : "both");
  set_compute_type(f.bench.engine, f.device);
  const OpenDevice open(f.device);
  InferBenchOptions& b = f.bench;
  b.engine.device = open.device;
  b.weights = {b.engine.weights};
  b.kv = {b.engine.kv};
  if (!f.weights.empty()) b.weights.clear();
  if (!f.kv.empty()) b.kv.clear();
  for (const std::string& name : f.weights) b.weights.push_back(weight_format_from_name(name, "--formats"));
  for (const std::string& name : f.kv) b.kv.push_back(kv_format_from_name(name, "--kv-formats"));
  const auto draft = load_draft_model(f.draft_model, b.engine);
  b.draft = draft.get();
  const auto model = f.model.empty() ? Model::random(load_config(f.preset), 1) : Model::load(f.model);

  const char* length = decode ? "depth" : "length";
  if (!globals.json) {
    print_line(fmt::format("{:<8}{:<6}{:>7}{:>7}{:>8}{:>11}{:>11}{:>11}{:>10}{:>9}{}", "weights", "kv", "threads",
                           "batch", length, "tok/s", "lowest", "highest", decode ? "step ms" : "TTFT ms",
                           decode ? "GB/s" : "GFLOP/s", decode ? "  limit" : ""));
  }
  const auto on_row = [&](const ordered_json& r) {
    if (globals.json) return;
    const auto num = [&](const char* key) { return r[key].get<double>(); };
    const ordered_json& rate = r[decode ? "gbytes_per_second" : "gflops"];  // null: says nothing here
    std::string last = fmt::format("{:>9}", rate.is_null() ? "-" : fmt::format("{:.1f}", rate.get<double>()));
    if (decode) last += rate.is_null() ? "      -" : fmt::format("{:>6.0f}%", 100 * num("share_of_limit"));
    print_line(fmt::format("{:<8}{:<6}{:>7}{:>7}{:>8}{:>11.1f}{:>11.1f}{:>11.1f}{:>10.3f}{}",
                           r["weights"].get<std::string>(), r["kv"].get<std::string>(), r["threads"].get<int>(),
                           r["batch"].get<int64_t>(), r[length].get<int64_t>(), num("tokens_per_second"), num("lowest"),
                           num("highest"), num(decode ? "step_ms" : "ttft_ms"), last));
  };
  const ordered_json result = decode ? bench_decode(*model, b, on_row) : bench_prefill(*model, b, on_row);
  if (globals.json) return print_result(globals, result);
  const std::string engine = result["engine"].is_null() ? "" : result["engine"].get<std::string>() + "; ";
  print_line(fmt::format("{}; {}memory moves {:.1f} GB/s at most here", result["processor"].get<std::string>(), engine,
                         result["bandwidth"].get<double>() / 1e9));
}

void add_one(CLI::App& group, Globals& globals, bool decode) {
  const auto f = std::make_shared<InferFlags>();
  InferBenchOptions& b = f->bench;
  CLI::App* c =
      decode
          ? group.add_subcommand(
                "decode",
                "Tokens a second one by one, by batch, depth, threads and formats, beside the bytes that must be read\n"
                "  minimind bench decode --model DIR --formats bf16,i8 --batch 1,8,32 --depth 0,1024 --threads 2,4")
          : group.add_subcommand("prefill",
                                 "Prompt tokens a second, by batch, length, threads and formats\n"
                                 "  minimind bench prefill --model DIR --formats bf16,i8 --length 128,512,1024");
  const auto positive = in_range(int64_t{1}, int64_t{1} << 24);
  c->add_option("--model", f->model, "Model folder");
  c->add_option(
      "--preset", f->preset,
      fmt::format("In place of a model, random weights: {}, or a config.json", fmt::join(preset_names(), ", ")));
  c->add_option("--batch", b.batch, "Sequences at once; a list is a sweep")->delimiter(',')->check(positive);
  if (decode) {
    b.length = {0};
    c->add_option("--depth", b.length, "Tokens before the first timed one; a list is a sweep")
        ->delimiter(',')
        ->check(at_least(0));
    c->add_option("--tokens", b.n_tok, "Timed tokens of each sequence")->check(positive);
  } else {
    c->add_option("--length", b.length, "Tokens of a prompt; a list is a sweep")->delimiter(',')->check(positive);
  }
  c->add_option("--formats", f->weights, "Weights as f32, bf16 and i8 in turn, in place of --weights")->delimiter(',');
  c->add_option("--kv-formats", f->kv, "Keys and values likewise, in place of --kv-type")->delimiter(',');
  c->add_option("--rounds", b.rounds, "The median of these counts")->check(positive);
  c->add_flag("--sampled", b.sampled, "Draw tokens by the default sampling in place of the most probable one");
  add_engine_flags(c, b.engine, f->device, f->draft_model);
  b.threads = {0};
  add_common_flags(c, globals, &b.threads);
  c->callback([f, &globals, decode] { run_bench(*f, globals, decode); });
}

}  // namespace

void add_bench_infer_commands(CLI::App& group, Globals& globals) {
  add_one(group, globals, true);
  add_one(group, globals, false);
}

}  // namespace mm
