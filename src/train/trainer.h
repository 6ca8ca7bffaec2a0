// The one training loop: data in, checkpoints and metrics out.
#pragma once

#include <optional>
#include <string>

#include "data/loader.h"
#include "text/tokenizer.h"
#include "train/schedule.h"
#include "train/spike.h"
#include "train/train_step.h"

namespace mm {

enum class NonFinitePolicy { stop, skip, rollback };
NonFinitePolicy non_finite_policy_from_name(const std::string& name);

struct TrainOptions {
  std::string title = "train";  // of the progress bar
  std::string output;           // run folder: final model, best/, checkpoints/, metrics.jsonl, tensorboard/
  LoaderOptions loader;
  int64_t accumulation_steps = 1;  // micro-batches an optimizer step
  double epochs = 1;
  int64_t max_steps = 0;    // 0: as epochs say
  Schedule schedule;        // total_steps is set by the trainer
  StepOptions step;         // max_tok and seed are set by the trainer
  int64_t pass_tokens = 0;  // GPU: tokens of a forward pass at most; larger micro-batches are cut. 0: as they come
  uint64_t seed = 42;
  int64_t save_every = 500, keep_checkpoints = 2;  // optimizer steps; 0: only at the end
  int64_t eval_every = 0;                          // optimizer steps; 0: at the end only
  SpikeOptions spike;
  NonFinitePolicy non_finite = NonFinitePolicy::stop;
  bool resume = false;  // go on from the newest whole checkpoint in `output`, from the beginning if there is none
  std::optional<std::string> checkpoint;  // what find_checkpoint(output) said, if the caller has asked it already
  Device device;
};

struct TrainResult {
  int64_t steps = 0, skipped = 0, tokens = 0;  // tokens: of this process; steps: of the whole run
  double loss = 0;                             // of the last step
  std::optional<double> valid_nll_before, valid_nll, best_valid_nll;
  double seconds = 0, tokens_per_second = 0;  // of the steps of this process
  double share_of_peak = 0;                   // operations needed over those the machine was measured to do
  int64_t peak_memory = 0;                    // bytes resident at most; of a GPU's memory on a GPU
  bool interrupted = false;
};

// Trains `model` on `train`. Prints the memory plan before step 1. Ctrl-C saves a checkpoint and returns with
// interrupted set. Throws Error when data, options or checkpoint do not fit together, and (policy stop) when the loss
// is not finite.
TrainResult train_model(const TrainOptions& options, Model& model, const Tokenizer& tokenizer,
                        const TokenDataset& train, const std::optional<TokenDataset>& valid);

}  // namespace mm
