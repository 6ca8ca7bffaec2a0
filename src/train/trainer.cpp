#include "train/trainer.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>

#include "base/fs.h"
#include "base/interrupt.h"
#include "base/log.h"
#include "base/progress.h"
#include "kernels/machine.h"
#include "model/cost.h"
#include "model/nll.h"
#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/sentry.h"

namespace mm {

NonFinitePolicy non_finite_policy_from_name(const std::string& name) {
  if (name == "stop") return NonFinitePolicy::stop;
  if (name == "skip") return NonFinitePolicy::skip;
  if (name == "rollback") return NonFinitePolicy::rollback;
  throw Error("--on-nan", "stop, skip or rollback", name);
}

namespace {

// What the program holds: of the GPU's memory where that is what runs out, all of it since no other program is asked.
int64_t peak_memory_bytes(const Device& dev) {
  if (dev.on_gpu()) return static_cast<int64_t>(device_bytes_in_use());
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

int64_t planned_steps(const TrainOptions& o, const BatchLoader& loader) {
  if (o.max_steps > 0) return o.max_steps;
  double batches = 0;
  for (int64_t e = 0; static_cast<double>(e) < o.epochs; e++) {
    batches += std::min(1.0, o.epochs - static_cast<double>(e)) * static_cast<double>(loader.batches_in_epoch(e));
  }
  return std::max<int64_t>(1,
                           static_cast<int64_t>(std::ceil(batches / static_cast<double>(o.accumulation_steps) - 1e-9)));
}

// What must be equal for a resumed run to be the same run.
ordered_json run_identity(const TrainOptions& o, const ModelConfig& config, int64_t total_steps,
                          const TokenDataset& train) {
  return {{"data", fmt::format("{:016x}", train.fingerprint())},
          {"batch_size", o.loader.batch_size},
          {"seq_len", o.loader.seq_len},
          {"packed", o.loader.packed},
          {"accumulation_steps", o.accumulation_steps},
          {"seed", o.seed},
          {"total_steps", total_steps},
          {"schedule", schedule_kind_name(o.schedule.kind)},
          {"lr", o.schedule.base_lr},
          {"warmup_steps", o.schedule.warmup_steps},
          {"min_lr_ratio", o.schedule.min_ratio},
          {"decay_share", o.schedule.decay_share},
          {"beta1", o.step.optimizer.beta1},
          {"beta2", o.step.optimizer.beta2},
          {"weight_decay", o.step.optimizer.weight_decay},
          {"grad_clip", o.step.optimizer.grad_clip},
          {"dropout", config.dropout},
          {"spike_threshold", o.spike.threshold},
          {"matmul", dtype_name(o.device.matmul)},
          {"activations", dtype_name(o.device.act)}};
}

void require_same_run(const ordered_json& saved, const ordered_json& now, const std::string& dir) {
  for (const auto& [key, value] : now.items()) {
    const auto it = saved.find(key);
    if (it != saved.end() && *it != value) {
      throw Error(fmt::format("{}: {}", dir, key), it->dump() + " as when the run began", value.dump(),
                  "pass the same flags and data, or start a new run");
    }
  }
}

int64_t pass_tokens(const TrainOptions& o, const std::optional<TokenDataset>& valid) {
  const int64_t batch = o.loader.batch_size * o.loader.seq_len;
  const int64_t pass = o.pass_tokens > 0 ? std::min(batch, std::max(o.pass_tokens, o.loader.seq_len)) : batch;
  return std::max(pass, valid ? valid->max_row_len() : int64_t{0});
}

std::string describe(const MemoryPlan& p) {
  const auto b = [](size_t n) { return human_bytes(static_cast<double>(n)); };
  return fmt::format("weights {} + gradients {} + optimizer {} + activations {} + head {}{} = {}", b(p.weights),
                     b(p.gradients), b(p.optimizer), b(p.activations), b(p.lm_head),
                     p.kernels > 0 ? " + kernels " + b(p.kernels) : "", b(p.total()));
}

// A GPU that is too small is told before anything is allocated, and before anything in the output folder is touched.
void require_memory(const TrainOptions& o, const ModelConfig& config, const std::optional<TokenDataset>& valid) {
  if (!o.device.on_gpu()) return;
  const MemoryPlan plan = training_memory(config, pass_tokens(o, valid), o.device, o.step.recompute);
  const size_t free = cuda_free_bytes() + plan.kernels;  // those are allocated already
  if (plan.total() <= free) return;
  throw Error(
      "GPU memory", describe(plan), human_bytes(static_cast<double>(free)) + " free on " + cuda_status().name,
      "lower --pass-tokens (less memory, the same training), --batch-size or --seq-len, pass --recompute ffn, or end "
      "other programs on the GPU");
}

// The state of one run; train_model drives it.
class Run {
 public:
  Run(const TrainOptions& o, Model& model, const Tokenizer& tokenizer, const TokenDataset& train,
      const std::optional<TokenDataset>& valid)
      : o_(o),
        model_(model),
        tokenizer_(tokenizer),
        data_(train),
        valid_(valid),
        loader_(train, o.loader),
        spike_(o.spike),
        total_(planned_steps(o, loader_)),
        schedule_(o.schedule),
        step_(model, o.device, step_options()) {
    schedule_.total_steps = total_;
    check_schedule(schedule_);
  }

  TrainResult run() {
    print_plan();
    resume();
    Metrics metrics(o_.output, done_);
    if (valid_ && done_ == 0) {
      result_.valid_nll_before = validate("validation before");
      metrics.log(0, {{"valid/nll", *result_.valid_nll_before}, {"valid/ppl", std::exp(*result_.valid_nll_before)}});
    }
    const double peak = measure_peak_flops(o_.device);
    const double flops = train_flops_per_token(
        model_.config, static_cast<double>(data_.tokens()) / static_cast<double>(std::max<int64_t>(1, data_.rows())));
    InterruptGuard guard;
    Progress bar(o_.title, total_, "steps");
    double paused = 0;
    const double start = now_seconds();
    double last = start;
    const auto report = [&](const StepResult& r, int64_t step) {
      const double now = now_seconds();
      result_.tokens += r.tokens;
      result_.loss = r.loss;
      const double lr = lr_at(schedule_, step);
      metrics.log(step, {{"train/loss", r.targets > 0 ? r.loss : NAN},
                         {"train/aux_loss", r.aux_loss},
                         {"train/lr", lr},
                         {"train/grad_norm", r.grad_norm},
                         {"train/tokens", static_cast<double>(tokens_seen_)},
                         {"train/tokens_per_second", static_cast<double>(r.tokens) / (now - last)},
                         {"train/skipped", static_cast<double>(skipped_)}});
      last = now;
      const double speed = static_cast<double>(result_.tokens) / (now - start - paused);
      result_.share_of_peak = speed * flops / peak;
      bar.rate_units(result_.tokens, "tok");
      bar.set(step, fmt::format("loss {:.4f} lr {:.2e} peak {:.0f}% mem {}", r.loss, lr, 100 * result_.share_of_peak,
                                human_bytes(static_cast<double>(peak_memory_bytes(o_.device)))));
    };
    while (done_ < total_ && !InterruptGuard::requested()) {
      one_step(report);
      const bool validates = valid_ && o_.eval_every > 0 && done_ % o_.eval_every == 0 &&
                             done_<total_, saves = o_.save_every> 0 && done_ % o_.save_every == 0 && done_ < total_;
      if (!validates && !saves) continue;
      catch_up(report);
      const double t1 = now_seconds();
      if (validates) record_validation(metrics);
      if (saves) save();
      last = now_seconds();
      paused += last - t1;
    }
    catch_up(report);
    result_.seconds = now_seconds() - start - paused;
    result_.tokens_per_second = result_.seconds > 0 ? static_cast<double>(result_.tokens) / result_.seconds : 0;
    result_.interrupted = done_ < total_;
    bar.finish();
    if (!result_.interrupted && valid_ && validated_ != done_) record_validation(metrics);
    save();
    if (!result_.interrupted) {
      step_.pull();
      model_.save(o_.output);
      tokenizer_.save(o_.output);
    }
    result_.steps = done_;
    result_.skipped = skipped_;
    result_.peak_memory = peak_memory_bytes(o_.device);
    return result_;
  }

 private:
  StepOptions step_options() const {
    StepOptions s = o_.step;
    s.max_tok = pass_tokens(o_, valid_);
    s.seed = o_.seed;
    return s;
  }

  void print_plan() const {
    const MemoryPlan p = training_memory(model_.config, pass_tokens(o_, valid_), o_.device, o_.step.recompute);
    log_info("{} parameters; {} steps of {} tokens; memory: {}", human_count(static_cast<double>(model_.table.numel())),
             total_, o_.accumulation_steps * o_.loader.batch_size * o_.loader.seq_len, describe(p));
  }

  // Begins the next step; reports it, or on a GPU the one before, so that the GPU never waits for the host.
  template <class Report>
  void one_step(const Report& report) {
    micro_.resize(static_cast<size_t>(o_.accumulation_steps));
    for (TokenBatch& b : micro_) loader_.next(b);
    done_++;
    step_.begin(micro_, done_);
    if (step_.asynchronous() && spike_.never_skips()) {
      // Without a target there is nothing to learn, and AdamW would still decay the weights.
      const bool learns = std::any_of(micro_.begin(), micro_.end(),
                                      [](const TokenBatch& b) { return CrossEntropy::total_weight(b) > 0; });
      if (learns) step_.update(lr_at(schedule_, done_));
      // The batches are kept in case their step must be explained.
      if (!under_way_.empty()) catch_up(report);
      under_way_ = std::move(micro_);
      return;
    }
    const StepResult r = step_.result();
    if (accept(r, done_, micro_)) step_.update(lr_at(schedule_, done_));
    report(r, done_);
  }

  // Reports the step whose result was left for later.
  template <class Report>
  void catch_up(const Report& report) {
    if (under_way_.empty()) return;
    const int64_t number = ++reported_;
    const StepResult r = step_.result();
    accept(r, number, under_way_);  // a GPU has kept the weights by itself if it was not finite
    report(r, number);
    under_way_.clear();
  }

  // Counts the step and says whether its update is to be made.
  bool accept(const StepResult& r, int64_t number, const std::vector<TokenBatch>& micro) {
    tokens_seen_ += r.tokens;
    reported_ = number;
    if (r.targets == 0) {
      skipped_++;
      log_warn("step {}: no targets in its rows (cut before the answers?); step skipped", number);
    } else if (r.overflow) {
      skipped_++;
    } else if (!r.finite()) {
      handle_non_finite(number, micro);
    } else if (spike_.observe(r.loss)) {
      skipped_++;
      log_warn("step {}: loss {:.4f} is {:.1f} standard deviations above the last {}; step skipped", number, r.loss,
               spike_.last_z(), o_.spike.window);
    } else {
      bad_in_a_row_ = 0;
      return true;
    }
    return false;
  }

  void handle_non_finite(int64_t number, const std::vector<TokenBatch>& micro) {
    const std::string reason = explain_non_finite(o_.device, step_, micro, number, data_);
    if (o_.non_finite == NonFinitePolicy::stop || ++bad_in_a_row_ > max_bad_in_a_row) {
      const std::string last = find_checkpoint(o_.output);
      throw Error(
          fmt::format("step {}", number), "finite loss and gradients", "NaN or infinity in " + reason,
          fmt::format("the last checkpoint is {}; lower --lr, look at the data, or pass --on-nan skip or rollback",
                      last.empty() ? "none" : last));
    }
    skipped_++;
    log_warn("step {}: NaN or infinity in {}; step skipped", number, reason);
    if (o_.non_finite != NonFinitePolicy::rollback) return;
    const std::string dir = find_checkpoint(o_.output);
    if (dir.empty()) throw Error(o_.output, "a checkpoint to roll back to", "none", "save more often (--save-every)");
    const ordered_json state = load_checkpoint(dir, model_, step_);
    step_.set_updates(json_get<int64_t>(state, "updates", dir));
    log_warn("rolled back to the weights of {}; the data goes on", dir);
  }

  double validate(const std::string& title) {
    Progress bar(title, valid_->tokens(), "tok");
    const NllSum sum =
        sum_nll(o_.device, step_.model(), *valid_, step_.activations(), step_.head(), [&](int64_t tokens) {
          bar.set(tokens);
          return true;
        });
    return sum.mean();
  }

  void record_validation(Metrics& metrics) {
    const double nll = validate("validation");
    metrics.log(done_, {{"valid/nll", nll}, {"valid/ppl", std::exp(nll)}});
    if (!std::isfinite(nll)) return;
    result_.valid_nll = nll;
    validated_ = done_;
    if (best_ && *best_ <= nll) return;
    best_ = result_.best_valid_nll = nll;
    const std::string dir = path_join(o_.output, "best");
    step_.pull();
    model_.save(dir);
    tokenizer_.save(dir);
    write_file(path_join(dir, "best.json"), ordered_json{{"step", done_}, {"valid_nll", nll}}.dump(2) + "\n");
  }

  void save() {
    ordered_json state{
        {"step", done_},
        {"updates", step_.updates()},
        {"loss_scale", {{"scale", step_.loss_scale().scale}, {"good_steps", step_.loss_scale().good_steps}}},
        {"skipped", skipped_},
        {"tokens", tokens_seen_},
        {"cursor", loader_.cursor().to_json()},
        {"spike", spike_.to_json()},
        {"run", run_identity(o_, model_.config, total_, data_)}};
    if (best_) state["best_valid_nll"] = *best_;
    if (result_.valid_nll) state["valid"] = {{"step", validated_}, {"nll", *result_.valid_nll}};
    save_checkpoint(o_.output, done_, model_, step_, tokenizer_, state, o_.keep_checkpoints);
  }

  void resume() {
    remove_temporaries(o_.output);
    if (!o_.resume) {
      remove_checkpoints(o_.output);
      return;
    }
    const std::string dir = o_.checkpoint ? *o_.checkpoint : find_checkpoint(o_.output);
    if (dir.empty()) {
      log_warn("{}: no checkpoint to resume from; starting from the beginning", o_.output);
      return;
    }
    const ordered_json state = load_checkpoint(dir, model_, step_);
    require_same_run(json_get<ordered_json>(state, "run", dir), run_identity(o_, model_.config, total_, data_), dir);
    done_ = json_get<int64_t>(state, "step", dir);
    reported_ = done_;
    if (state.contains("loss_scale")) {  // written since there are GPUs
      const auto scale = json_get<ordered_json>(state, "loss_scale", dir);
      step_.set_loss_scale({json_get<double>(scale, "scale", dir), json_get<int64_t>(scale, "good_steps", dir)});
    }
    step_.set_updates(json_get<int64_t>(state, "updates", dir));
    skipped_ = json_get<int64_t>(state, "skipped", dir);
    tokens_seen_ = json_get<int64_t>(state, "tokens", dir);
    loader_.seek(LoaderCursor::from_json(json_get<ordered_json>(state, "cursor", dir), dir));
    spike_.restore(json_get<ordered_json>(state, "spike", dir), dir);
    if (state.contains("best_valid_nll"))
      best_ = result_.best_valid_nll = json_get<double>(state, "best_valid_nll", dir);
    if (state.contains("valid")) {
      const auto valid = json_get<ordered_json>(state, "valid", dir);
      validated_ = json_get<int64_t>(valid, "step", dir);
      result_.valid_nll = json_get<double>(valid, "nll", dir);
    }
    log_info("resumed from {} at step {}", dir, done_);
  }

  static constexpr int max_bad_in_a_row = 10;
  const TrainOptions& o_;
  Model& model_;
  const Tokenizer& tokenizer_;
  const TokenDataset& data_;
  const std::optional<TokenDataset>& valid_;
  BatchLoader loader_;
  SpikeDetector spike_;
  int64_t total_;
  Schedule schedule_;
  TrainStep step_;
  std::vector<TokenBatch> micro_, under_way_;         // under_way_: of the step whose result is asked for later
  int64_t done_ = 0, skipped_ = 0, tokens_seen_ = 0;  // done_: optimizer steps, skipped ones included
  int64_t reported_ = 0;                              // the last step reported
  int64_t validated_ = -1;                            // step of result_.valid_nll
  int bad_in_a_row_ = 0;
  std::optional<double> best_;
  TrainResult result_;
};

}  // namespace

TrainResult train_model(const TrainOptions& options, Model& model, const Tokenizer& tokenizer,
                        const TokenDataset& train, const std::optional<TokenDataset>& valid) {
  require_memory(options, model.config, valid);
  return Run(options, model, tokenizer, train, valid).run();
}

}  // namespace mm
