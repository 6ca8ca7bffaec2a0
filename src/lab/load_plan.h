// What a load test sends and when: lengths, texts and arrival times, each a function of (seed, number of the request)
// alone, so that two servers are asked the same in any order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"

namespace mm {

// A length in tokens.
struct LengthDistribution {
  enum class Kind { fixed, uniform, normal, lognormal };
  Kind kind = Kind::fixed;
  double a = 128, b = 0;  // fixed: the length; uniform: first, last; normal: mean, deviation; lognormal: median, sigma
  // In [1, max]; draws of (seed, stream) number i.
  int64_t draw(uint64_t seed, uint64_t stream, uint64_t i, int64_t max) const;
};
// "128", "uniform:16:512", "normal:256:64", "lognormal:128:0.8" (median and the logarithm's deviation). Error naming
// the flag on anything else.
LengthDistribution length_distribution_from_text(const std::string& text, const std::string& flag);

// Seconds after the start of arrivals 0 .. n - 1 of a Poisson process of `rate` a second.
std::vector<double> poisson_arrivals(double rate, int64_t n, uint64_t seed);

// About n tokens of short common English words, each one token in most vocabularies (the server's usage says how many
// it really were). The first `shared` words are the same for every i.
std::string synthetic_prompt(uint64_t seed, uint64_t i, int64_t n, int64_t shared);

// Rows {"conversations": [...]} (MiniMind's SFT format; a last answer of the assistant is left out), {"messages":
// [...]} or {"prompt": "..."}. Every row becomes an array of messages. Error naming file and line.
std::vector<ordered_json> load_prompts(const std::string& path);

struct LoadPlan {
  std::string model;
  bool chat = true;  // /v1/chat/completions, else /v1/completions
  bool stream = true, ignore_eos = true;
  std::vector<ordered_json> prompts;  // taken in an order shuffled by the seed, again and again; empty: synthetic
  LengthDistribution prompt_tokens, output_tokens;
  int64_t shared_tokens = 0, max_tokens = 32768;
  double temperature = 1.0;
  uint64_t seed = 0;
  ordered_json extra;  // further fields of every request

  ordered_json request(uint64_t i) const;  // its body
};

}  // namespace mm
