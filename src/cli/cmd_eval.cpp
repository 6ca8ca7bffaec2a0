// `minimind eval`: how good is a model?
#include "base/error.h"
#include "cli/command.h"
#include "eval/perplexity.h"

namespace mm {

struct PplFlags {
  std::string model;
  std::vector<std::string> data;
  bool no_empty_think = false;
  PerplexityOptions options;
  DeviceOptions device;
};

void add_eval_commands(CLI::App& app, Globals& globals) {
  CLI::App* eval = app.add_subcommand("eval", "Measure a model");
  eval->require_subcommand(1);
  auto flags = std::make_shared<PplFlags>();
  CLI::App* ppl = eval->add_subcommand("ppl", "Perplexity on texts or conversations, each row alone");
  ppl->add_option("--model", flags->model, "Model folder")->required();
  ppl->add_option("--data", flags->data, "Data files (.jsonl, .jsonl.gz, .jsonl.zst)")->required();
  ppl->add_option("--max-len", flags->options.max_len, "Tokens a row at most; longer rows are cut");
  ppl->add_flag("--no-empty-think", flags->no_empty_think, "Remove empty <think></think> from conversations");
  ppl->add_option("--batch-tokens", flags->options.batch_tokens, "Tokens a pass (speed and memory only)");
  add_device_flags(ppl, flags->device);
  add_common_flags(ppl, globals);
  ppl->callback([flags, &globals] {
    flags->options.keep_empty_think = !flags->no_empty_think;
    const OpenDevice open(flags->device);
    flags->options.device = open.device;
    const auto model = Model::load(flags->model);
    const Perplexity p = perplexity(*model, Tokenizer::load(flags->model), flags->data, flags->options);
    print_result(globals, {{"nll", p.nll},
                           {"ppl", p.ppl},
                           {"targets", p.targets},
                           {"rows", p.rows},
                           {"tokens", p.tokens},
                           {"tokens_per_second", static_cast<double>(p.tokens) / p.seconds}});
  });
}

}  // namespace mm
