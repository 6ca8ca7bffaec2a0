// minimind bench train|ops: how fast training and its ops are here.
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "lab/bench.h"
#include "lab/bench_ops.h"

namespace mm {

static void print_bench(const ordered_json& r) {
  const auto num = [](const ordered_json& j, const char* key) { return j[key].get<double>(); };
  print_line(fmt::format(
      "{} threads, {}, {} products: {} tok/s, {:.1f} ms a step (fastest {:.1f}), {:.0f}% of the measured {:.0f} "
      "GFLOP/s, peak memory {}",
      r["threads"].get<int>(), r["isa"].get<std::string>(), r["dtype"].get<std::string>(),
      human_count(num(r, "tokens_per_second")), 1e3 * num(r, "step_seconds"), 1e3 * num(r, "step_seconds_min"),
      100 * num(r, "share_of_peak"), num(r, "peak_flops") / 1e9, human_bytes(num(r, "peak_memory_bytes"))));
  print_line(fmt::format("{:<18}{:>7}{:>10}{:>8}{:>10}{:>8}{:>9}{:>8}", "op", "calls", "ms", "step", "GFLOP/s", "peak",
                         "GB/s", "copy"));
  for (const ordered_json& o : r["ops"]) {
    print_line(fmt::format("{:<18}{:>7}{:>10.2f}{:>7.1f}%{:>10.1f}{:>7.0f}%{:>9.1f}{:>7.0f}%",
                           o["op"].get<std::string>(), o["calls"].get<int64_t>(), num(o, "ms"),
                           100 * num(o, "share_of_step"), num(o, "gflops"), 100 * num(o, "share_of_peak"),
                           num(o, "gbytes_per_second"), 100 * num(o, "share_of_bandwidth")));
  }
}

void add_bench_command(CLI::App& app, Globals& globals) {
  struct Flags {
    std::string preset = "minimind2-small", recompute = "cheap";
    DeviceOptions device;
    TrainBenchOptions bench;
  };
  const auto f = std::make_shared<Flags>();
  CLI::App* group = app.add_subcommand("bench", "Measure this program on this machine");
  group->require_subcommand(1);
  CLI::App* c = group->add_subcommand(
      "train",
      "Training steps on random tokens: tokens/s, memory, and each op's share of the machine's measured limits\n"
      "  minimind bench train --preset minimind2-small --batch-size 4 --seq-len 512 --dtype bf16");
  c->add_option("--preset", f->preset, fmt::format("{}, or a config.json", fmt::join(preset_names(), ", ")));
  c->add_option("--batch-size", f->bench.batch_size, "Sequences")->check(in_range(1, 1 << 16));
  c->add_option("--seq-len", f->bench.seq_len, "Tokens a sequence")->check(in_range(2, 1 << 20));
  c->add_option("--steps", f->bench.steps, "Timed steps (the median counts)")->check(in_range(1, 100000));
  c->add_option("--recompute", f->recompute, "none, cheap or ffn, see pretrain")
      ->check(CLI::IsMember({"none", "cheap", "ffn"}));
  c->add_option("--pass-tokens", f->bench.pass_tokens, "GPU: tokens of a forward pass at most, see pretrain")
      ->check(at_least(0));
  add_device_flags(c, f->device, /*naive=*/true);
  add_common_flags(c, globals);
  c->callback([f, &globals] {
    f->bench.config = load_config(f->preset);
    const OpenDevice open(f->device);
    f->bench.device = open.device;
    f->bench.recompute = recompute_from_name(f->recompute);
    const ordered_json r = bench_train(f->bench);
    if (globals.json) print_result(globals, r);
    else print_bench(r);
  });

  struct OpFlags {
    int64_t tokens = 24576;
    int rounds = 7;
    DeviceOptions device;
  };
  const auto o = std::make_shared<OpFlags>();
  CLI::App* ops = group->add_subcommand("ops",
                                        "Single ops at the sizes of a training step, against the machine's limits\n"
                                        "  minimind bench ops --device cuda --naive-norm");
  ops->add_option("--tokens", o->tokens, "Tokens of a pass (24576 is 32 rows of 768; take 1024 or so on a CPU)")
      ->check(in_range(64, 1 << 20));
  ops->add_option("--rounds", o->rounds, "The median of these counts")->check(in_range(1, 1000));
  add_device_flags(ops, o->device, /*naive=*/true);
  add_common_flags(ops, globals);
  ops->callback([o, &globals] {
    const OpenDevice open(o->device);
    const ordered_json r = bench_ops(open.device, o->tokens, o->rounds);
    if (globals.json) return print_result(globals, r);
    const auto num = [](const ordered_json& j, const char* key) { return j[key].get<double>(); };
    print_line(fmt::format("{}, {}: {:.1f} TFLOP/s, {:.0f} GB/s measured", r["processor"].get<std::string>(),
                           r["dtype"].get<std::string>(), num(r, "peak_flops") / 1e12, num(r, "bandwidth") / 1e9));
    print_line(
        fmt::format("{:<30}{:<22}{:>10}{:>10}{:>7}{:>9}{:>7}", "op", "shape", "us", "GFLOP/s", "peak", "GB/s", "copy"));
    for (const ordered_json& j : r["ops"]) {
      print_line(fmt::format("{:<30}{:<22}{:>10.1f}{:>10.0f}{:>6.0f}%{:>9.0f}{:>6.0f}%", j["op"].get<std::string>(),
                             j["shape"].get<std::string>(), num(j, "us"), num(j, "gflops"),
                             100 * num(j, "share_of_peak"), num(j, "gbytes_per_second"),
                             100 * num(j, "share_of_bandwidth")));
    }
  });
  add_bench_infer_commands(*group, globals);
  add_bench_serve_command(*group, globals);
  add_bench_soak_command(*group, globals);
}

}  // namespace mm
