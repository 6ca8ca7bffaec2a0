// From a row of logits to the next token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sample.h"

namespace mm {

// Defaults are those of MiniMind's generate(). Filters apply in MiniMind's order:
//   1. logit / temperature
//   2. repetition penalty on every token seen so far, prompt included: x > 0 ? x / penalty : x * penalty
//      presence penalty (once) and frequency penalty (times the count) on generated tokens, subtracted from the logit
//      before temperature, as the OpenAI API does
//   3. top-k: logits below the k-th largest go (ties with it stay)
//   4. top-p: sorted by probability, what comes after the token whose cumulated probability exceeds top_p goes
//   5. min-p: probabilities below min_p times the largest go
struct SamplingParams {
  bool greedy = false;        // the largest logit after the penalties; lowest id on a tie
  float temperature = 0.85f;  // 0 means greedy
  int32_t top_k = 50;         // 0: off
  float top_p = 0.85f;        // 1: off
  float min_p = 0.0f;         // 0: off
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
};

// Error naming the field when a value is out of range.
void check_sampling(const SamplingParams& params);

// A row's parameters as an engine step holds them; the draw depends on (seed, stream, index).
RowSampling sampling_of(const SamplingParams& params, uint64_t stream, uint64_t index);

struct Candidate {
  int32_t id;
  float prob;  // after all filters; the candidates' sum to 1
};

struct TokenLogprob {
  int32_t id;
  float logprob;  // log-softmax of the raw logits
};

// Whether a row's draw is the first largest of its raw logits.
bool draws_largest(const RowSampling& row);

// Holds scratch memory only: one sampler may serve any number of sequences, one call at a time. The first calls
// allocate, later ones with the same vocabulary do not.
class Sampler {
 public:
  // Draws the next token of a sequence. logits: [n_vocab] of its last token, unchanged. history: prompt and generated
  // tokens, of which the first n_prompt are the prompt; ids outside the vocabulary are ignored. The draw depends on
  // (params.seed, stream, history.size()) and the arguments alone: never on other sequences of a batch or on calls
  // before. Error when a logit is NaN or +infinity or when all are -infinity (broken weights); -infinity masks a token.
  int32_t sample(std::span<const float> logits, const SamplingParams& params, std::span<const int32_t> history,
                 int64_t n_prompt, uint64_t stream);

  // The same from a row's parameters as an engine step holds them. mask: bits of the allowed tokens, or empty. -1 when
  // a logit is NaN or +infinity, or when nothing is left to draw.
  int32_t sample_row(std::span<const float> logits, const RowSampling& row, std::span<const LogitEdit> edits,
                     std::span<const uint32_t> mask);

  // What sample() draws from (not greedy): the tokens that pass the filters. Valid until the next call.
  std::span<const Candidate> candidates(std::span<const float> logits, const SamplingParams& params,
                                        std::span<const int32_t> history, int64_t n_prompt);

  // Log-probability of `id` under the raw logits, and of the n most probable tokens, best first (lowest id on a tie).
  // `top` is resized, so a reused vector does not allocate.
  float logprobs(std::span<const float> logits, int32_t id, int64_t n, std::vector<TokenLogprob>& top);

 private:
  RowSampling row_of(const SamplingParams& params, std::span<const int32_t> history, int64_t n_prompt, uint64_t stream);
  std::span<const Candidate> filter(std::span<const float> logits, const RowSampling& row,
                                    std::span<const LogitEdit> edits);
  int32_t draw(std::span<const float> logits, const RowSampling& row, std::span<const LogitEdit> edits);
  void keep_top_k(int64_t k);
  void keep_top_p(float top_p);

  struct Scored {
    float score;
    int32_t id;
  };
  std::vector<float> scores_;     // [n_vocab] processed logits
  std::vector<float> masked_;     // [n_vocab] logits with what the mask forbids at -infinity
  std::vector<LogitEdit> edits_;  // of a history
  std::vector<int32_t> place_;    // [n_vocab] index in edits_ plus 1, all zero between calls
  std::vector<Scored> pool_;      // candidates while filtering
  std::vector<float> values_;     // scratch of the k-th largest
  std::vector<Candidate> kept_;
};

}  // namespace mm
