// minimind pretrain, minimind sft: flags to TrainOptions, then train_model.
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "train/checkpoint.h"
#include "train/trainer.h"

namespace mm {

namespace {

struct TrainFlags {
  SampleKind kind = SampleKind::pretrain;
  TrainOptions train;
  std::vector<std::string> data, valid;
  double valid_share = 0;
  std::string tokenizer, preset = "minimind-3", init;
  std::string schedule = "cosine", on_nan = "stop", cache, recompute = "cheap";
  DeviceOptions device;
  bool padded = false, overwrite = false;
  double dropout = -1, empty_think_ratio = 0.2, system_ratio = 0.2, max_bad_share = 0.01;
};

void add_data_flags(CLI::App* c, TrainFlags& f) {
  c->add_option("--data", f.data, "Training data: .jsonl, .jsonl.gz or .jsonl.zst, several allowed")
      ->required()
      ->group("Data");
  c->add_option("--valid", f.valid, "Validation data of the same form")->group("Data");
  c->add_option("--valid-share", f.valid_share, "Without --valid: share of the rows held out")
      ->check(in_range(0.0, 0.5))
      ->group("Data");
  c->add_option("--seq-len", f.train.loader.seq_len, "Tokens a row at most; longer rows are cut")
      ->check(in_range(8, 1 << 20))
      ->group("Data");
  c->add_option("--batch-size", f.train.loader.batch_size, "Rows of seq-len tokens a micro-batch")
      ->check(in_range(1, 1 << 16))
      ->group("Data");
  c->add_option("--accumulation-steps", f.train.accumulation_steps, "Micro-batches an optimizer step")
      ->check(in_range(1, 4096))
      ->group("Data");
  c->add_flag("--padded", f.padded,
              "One row a sequence with padding, as MiniMind; otherwise rows are packed and nothing is lost to padding")
      ->group("Data");
  c->add_option("--cache", f.cache, "Folder of the tokenized data (default: OUTPUT/cache)")->group("Data");
  c->add_option("--max-bad-share", f.max_bad_share, "Share of bad rows above which the run stops")
      ->check(in_range(0.0, 1.0))
      ->group("Data");
  if (f.kind != SampleKind::chat) return;
  c->add_option("--empty-think-ratio", f.empty_think_ratio,
                "Share of answers without thinking that keep the empty <think> block")
      ->check(in_range(0.0, 1.0))
      ->group("Data");
  c->add_option("--system-ratio", f.system_ratio, "Share of chats without a system message that get one of MiniMind's")
      ->check(in_range(0.0, 1.0))
      ->group("Data");
}

void add_run_flags(CLI::App* c, TrainFlags& f) {
  TrainOptions& t = f.train;
  c->add_option("--output", t.output,
                "Run folder: the model (Hugging Face form), best/, checkpoints/, metrics.jsonl, tensorboard/")
      ->required()
      ->group("Run");
  c->add_flag("--resume", t.resume, "Go on from the newest whole checkpoint in --output")->group("Run");
  c->add_flag("--overwrite", f.overwrite, "Allow an --output that already holds files")->group("Run");
  c->add_option("--save-every", t.save_every, "Optimizer steps between checkpoints (0: only at the end)")
      ->check(at_least(0))
      ->group("Run");
  c->add_option("--keep-checkpoints", t.keep_checkpoints, "Newest checkpoints kept")
      ->check(in_range(1, 1000))
      ->group("Run");
  c->add_option("--eval-every", t.eval_every, "Optimizer steps between validations (0: before and at the end)")
      ->check(at_least(0))
      ->group("Run");
  c->add_option("--seed", t.seed, "Seed of weights, order and dropout")->group("Run");
  add_device_flags(c, f.device, /*naive=*/true);
  c->add_option("--recompute", f.recompute,
                "What backward computes again to save memory: none, cheap (norms, rotations, activations) or ffn "
                "(the gate and up products too)")
      ->check(CLI::IsMember({"none", "cheap", "ffn"}))
      ->group("Device");
  c->add_option("--pass-tokens", t.pass_tokens,
                "GPU: tokens of a forward pass at most; a larger batch is computed in parts: less memory, the same "
                "result up to rounding (with experts each part has its own balance loss). 0: the whole micro-batch")
      ->check(at_least(0))
      ->group("Device");
}

void add_optimizer_flags(CLI::App* c, TrainFlags& f) {
  TrainOptions& t = f.train;
  c->add_option("--epochs", t.epochs, "Passes over the data")->check(above_zero())->group("Optimizer");
  c->add_option("--steps", t.max_steps, "Optimizer steps, instead of --epochs")->check(at_least(0))->group("Optimizer");
  c->add_option("--lr", t.schedule.base_lr, "Highest learning rate")->check(above_zero())->group("Optimizer");
  c->add_option("--schedule", f.schedule, "cosine (MiniMind's), constant, linear or wsd")
      ->check(CLI::IsMember({"cosine", "constant", "linear", "wsd"}))
      ->group("Optimizer");
  c->add_option("--warmup-steps", t.schedule.warmup_steps, "Optimizer steps of linear warm-up")
      ->check(at_least(0))
      ->group("Optimizer");
  c->add_option("--min-lr-ratio", t.schedule.min_ratio, "Last learning rate over the highest")
      ->check(in_range(0.0, 1.0))
      ->group("Optimizer");
  c->add_option("--decay-share", t.schedule.decay_share, "wsd: share of the steps that the rate falls")
      ->check(in_range(0.0, 1.0))
      ->group("Optimizer");
  c->add_option("--weight-decay", t.step.optimizer.weight_decay, "AdamW's, on every parameter")
      ->check(at_least(0))
      ->group("Optimizer");
  c->add_option("--beta1", t.step.optimizer.beta1)->check(in_range(0.0, 0.99999))->group("Optimizer");
  c->add_option("--beta2", t.step.optimizer.beta2)->check(in_range(0.0, 0.999999))->group("Optimizer");
  c->add_option("--grad-clip", t.step.optimizer.grad_clip, "Largest gradient norm (0: no clipping)")
      ->check(at_least(0))
      ->group("Optimizer");
  c->add_option("--dropout", f.dropout, "Overrides the config's dropout")
      ->check(in_range(0.0, 0.9))
      ->group("Optimizer");
  c->add_option("--on-nan", f.on_nan,
                "A loss or gradient that is not finite: stop, skip the step, or rollback to the last checkpoint")
      ->check(CLI::IsMember({"stop", "skip", "rollback"}))
      ->group("Optimizer");
  c->add_option("--spike-threshold", t.spike.threshold,
                "Skip a step whose loss is this many standard deviations high (0: never)")
      ->check(at_least(0))
      ->group("Optimizer");
}

std::unique_ptr<Model> starting_model(const TrainFlags& f, const Tokenizer& tokenizer) {
  const auto fits = [&](const ModelConfig& c, const std::string& where) {
    if (tokenizer.vocab_size() > c.vocab_size) {
      throw Error(where, fmt::format("vocab_size of at least {} (the tokenizer's)", tokenizer.vocab_size()),
                  std::to_string(c.vocab_size), "use the tokenizer that belongs to the model");
    }
    if (f.train.loader.seq_len > c.max_position_embeddings) {
      throw Error("--seq-len",
                  fmt::format("at most {} (max_position_embeddings of {})", c.max_position_embeddings, where),
                  std::to_string(f.train.loader.seq_len));
    }
  };
  const std::string checkpoint = f.train.checkpoint.value_or("");
  const std::string from = !checkpoint.empty() ? checkpoint : f.init;
  std::unique_ptr<Model> model;
  if (!from.empty()) {
    model = Model::load(from);
    fits(model->config, from);
  } else {
    ModelConfig config = load_config(f.preset);
    const auto presets = preset_names();
    if (std::find(presets.begin(), presets.end(), f.preset) != presets.end())
      config.vocab_size = tokenizer.vocab_size();
    fits(config, f.preset);
    model = Model::random(config, f.train.seed);
  }
  ModelConfig& c = model->config;
  if (f.dropout >= 0) c.dropout = static_cast<float>(f.dropout);
  c.bos_token_id = tokenizer.bos_id();
  c.eos_token_id = tokenizer.eos_id();
  c.pad_token_id = tokenizer.pad_id();
  return model;
}

void run_training(TrainFlags f, const Globals& globals) {
  TrainOptions& t = f.train;
  t.loader.packed = !f.padded;
  t.loader.seed = t.seed;
  t.schedule.kind = schedule_kind_from_name(f.schedule);
  Schedule plan = t.schedule;  // before the data is read; the trainer checks again with the true number of steps
  plan.total_steps = t.max_steps > 0 ? t.max_steps : std::numeric_limits<int64_t>::max();
  check_schedule(plan);
  t.non_finite = non_finite_policy_from_name(f.on_nan);
  const OpenDevice open(f.device);
  t.device = open.device;
  t.step.recompute = recompute_from_name(f.recompute);
  const Tokenizer tokenizer = Tokenizer::load(f.tokenizer.empty() ? f.init : f.tokenizer);
  t.loader.pad_id = tokenizer.pad_id();
  if (t.resume) t.checkpoint = find_checkpoint(t.output);
  else require_new_dir(t.output, f.overwrite);
  SampleOptions s{.kind = f.kind,
                  .max_len = t.loader.seq_len,
                  .empty_think_ratio = f.empty_think_ratio,
                  .system_ratio = f.system_ratio,
                  .seed = t.seed,
                  .max_bad_share = f.max_bad_share};
  const std::unique_ptr<Model> model = starting_model(f, tokenizer);
  const std::string cache = f.cache.empty() ? path_join(t.output, "cache") : f.cache;
  TokenDataset train = TokenDataset::build(f.data, tokenizer, s, cache);
  std::optional<TokenDataset> valid;
  if (!f.valid.empty()) {
    SampleOptions e = SampleOptions::evaluation(f.kind, t.loader.seq_len);
    valid = TokenDataset::build(f.valid, tokenizer, e, cache);
  } else if (f.valid_share > 0) {
    auto [rest, held_out] = train.split(f.valid_share, t.seed);
    train = rest;
    valid = held_out;
  }
  if (train.targets() == 0)
    throw Error(f.data.front(), "rows with something to predict", "none within --seq-len",
                "raise --seq-len or look with `minimind data show`");
  const TrainResult r = train_model(t, *model, tokenizer, train, valid);
  ordered_json out{{"output", t.output},
                   {"steps", r.steps},
                   {"skipped", r.skipped},
                   {"loss", r.loss},
                   {"tokens", r.tokens},
                   {"seconds", r.seconds},
                   {"tokens_per_second", r.tokens_per_second},
                   {"share_of_peak", r.share_of_peak},
                   {"peak_memory_bytes", r.peak_memory},
                   {"interrupted", r.interrupted}};
  if (r.valid_nll_before) out["valid_nll_before"] = *r.valid_nll_before;
  if (r.valid_nll) out["valid_nll"] = *r.valid_nll;
  if (r.best_valid_nll) out["best_valid_nll"] = *r.best_valid_nll;
  print_result(globals, out);
  if (r.interrupted) {
    log_info("interrupted; a checkpoint is saved, go on with the same command and --resume");
    throw CLI::RuntimeError(130);
  }
}

}  // namespace

void add_train_commands(CLI::App& app, Globals& globals) {
  const auto pretrain = std::make_shared<TrainFlags>();
  pretrain->train.title = "pretrain";
  pretrain->train.loader = {.batch_size = 32, .seq_len = 340};
  pretrain->train.accumulation_steps = 8;
  CLI::App* p = app.add_subcommand("pretrain",
                                   "Train a model from nothing (or go on from --init) on {\"text\"} rows\n"
                                   "  minimind pretrain --preset minimind2-small --tokenizer TOK --data pretrain.jsonl "
                                   "--valid-share 0.01 --output runs/pre");
  p->add_option("--preset", pretrain->preset,
                fmt::format("Shape of a new model: {}, or a Hugging Face config.json", fmt::join(preset_names(), ", ")))
      ->group("Model");
  p->add_option("--init", pretrain->init, "Start from this model folder instead of random weights")->group("Model");
  p->add_option("--tokenizer", pretrain->tokenizer, "Folder with tokenizer.json (default: that of --init)")
      ->group("Model");
  add_data_flags(p, *pretrain);
  add_run_flags(p, *pretrain);
  add_optimizer_flags(p, *pretrain);
  add_common_flags(p, globals);
  p->callback([pretrain, &globals] {
    if (pretrain->tokenizer.empty() && pretrain->init.empty())
      throw Error("pretrain", "--tokenizer DIR or --init DIR", "neither", "train one with `minimind tokenizer train`");
    run_training(*pretrain, globals);
  });

  const auto sft = std::make_shared<TrainFlags>();
  sft->kind = SampleKind::chat;
  sft->train.title = "sft";
  sft->train.loader = {.batch_size = 16, .seq_len = 768};
  sft->train.schedule.base_lr = 1e-5;
  CLI::App* s = app.add_subcommand(
      "sft",
      "Fine-tune a model on conversations; only the assistant's tokens count\n"
      "  minimind sft --model runs/pre --data sft.jsonl --valid sft_valid.jsonl --lr 1e-4 --output runs/sft");
  s->add_option("--model,--init", sft->init, "Model folder to start from")->required()->group("Model");
  s->add_option("--tokenizer", sft->tokenizer, "Folder with tokenizer.json (default: the model's)")->group("Model");
  add_data_flags(s, *sft);
  add_run_flags(s, *sft);
  add_optimizer_flags(s, *sft);
  add_common_flags(s, globals);
  s->callback([sft, &globals] { run_training(*sft, globals); });
}

}  // namespace mm
