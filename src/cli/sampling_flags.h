// Flags of generate and chat that say how tokens are drawn.
#pragma once

#include <CLI/CLI.hpp>

#include "engine/sampler.h"

namespace mm {

inline void add_sampling_flags(CLI::App* command, SamplingParams& params) {
  command->add_flag("--greedy", params.greedy, "Always take the most probable token");
  command->add_option("--temperature", params.temperature, "Randomness; 0 is greedy");
  command->add_option("--top-k", params.top_k, "Draw from the k most probable tokens (0: all)");
  command->add_option("--top-p", params.top_p, "Draw from the fewest tokens whose probabilities exceed p (1: all)");
  command->add_option("--min-p", params.min_p,
                      "Leave out tokens below this share of the largest probability (0: none)");
  command->add_option("--repetition-penalty", params.repetition_penalty,
                      "Above 1: tokens of prompt and answer less likely");
  command->add_option("--presence-penalty", params.presence_penalty, "Subtracted once from tokens of the answer");
  command->add_option("--frequency-penalty", params.frequency_penalty, "Subtracted for every time a token came");
  command->add_option("--seed", params.seed, "Seed of the draws; the same seed gives the same text");
}

}  // namespace mm
