// `minimind demo`: from nothing to a chat, in minutes.
#include "base/error.h"
#include "base/progress.h"
#include "cli/command.h"
#include "lab/demo.h"

namespace mm {

namespace {

void demo(const DemoOptions& options, const Globals& globals) {
  const DemoSink say = [&](const std::string& line) {
    if (!globals.json) print_line(line);
  };
  const DemoReport report = run_demo(options, say);
  if (report.interrupted) {
    if (globals.json) print_result(globals, report.to_json());
    say("\ninterrupted; everything so far is saved. The same command goes on from there.");
    throw CLI::RuntimeError(130);
  }
  if (globals.json) {
    print_result(globals, report.to_json());
    return;
  }
  say(fmt::format("\ndone in {}. Held-out accuracy on two-digit additions: {:.1f} %.", human_duration(report.seconds),
                  100 * report.additions.share()));
  say(fmt::format("  loss curve     {}   (numbers: {}/pretrain/metrics.jsonl, {}/sft/metrics.jsonl)", report.loss_plot,
                  options.output, options.output));
  say(fmt::format("  report         {}", report.report));
  say("\nGo on:");
  say(fmt::format("  minimind chat --model {}                     talk with it (/think lets it think first)",
                  report.model));
  say(fmt::format("  minimind eval ppl --model {} --data {}/data/sft_valid.jsonl", report.model, options.output));
  say(fmt::format("  minimind data show {}/data/sft.jsonl --tokenizer {}   what it learnt from", options.output,
                  report.model));
  say("  minimind --help                                    everything else");
}

}  // namespace

void add_demo_command(CLI::App& app, Globals& globals) {
  auto options = std::make_shared<DemoOptions>();
  CLI::App* command =
      app.add_subcommand("demo", "Train a tokenizer and a small bilingual model from nothing, test it, talk with it");
  command->add_option("--output", options->output, "Folder for everything it makes");
  command->add_option("--seed", options->seed, "Another seed is another world order, another split and another model");
  command->add_option("--budget", options->budget,
                      "Share of the full training data: less is faster and worse (below 0.6 it can hardly add)");
  command->add_flag("--overwrite", options->overwrite, "Replace an earlier demo in the output folder");
  add_common_flags(command, globals);
  command->callback([options, &globals] { demo(*options, globals); });
}

}  // namespace mm
