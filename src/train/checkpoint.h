// Checkpoints of a run: RUN/checkpoints/step-00000060/ is a Hugging Face folder (config.json, model.safetensors in fp32
// = the masters, tokenizer) plus trainer/ (moments.safetensors, state.json with counters, data cursor and the size and
// hash of every file, and a hash of itself).
#pragma once

#include <optional>
#include <string>

#include "base/json.h"
#include "text/tokenizer.h"
#include "train/train_step.h"

namespace mm {

// Written beside its final place and renamed when every file is on the disk, so a checkpoint is complete or absent.
// Keeps the newest `keep` and removes older ones, and those of later steps: they are damaged or of a run that was given
// up. Does nothing if this step's checkpoint is there already and whole.
void save_checkpoint(const std::string& run_dir, int64_t step, const Model& model, TrainStep& train,
                     const Tokenizer& tokenizer, const ordered_json& state, int64_t keep);

// Newest checkpoint that is whole (sizes and hashes agree); damaged ones are passed over with a warning. "" if there is
// none.
std::string find_checkpoint(const std::string& run_dir);

// Weights and moments into model and train; returns the state saved with them.
ordered_json load_checkpoint(const std::string& checkpoint_dir, Model& model, TrainStep& train);

// Removes half-written files that a killed run left in its folder.
void remove_temporaries(const std::string& run_dir);

// Removes all checkpoints of a run folder: a new run begins in it and must not go back to them.
void remove_checkpoints(const std::string& run_dir);

}  // namespace mm
