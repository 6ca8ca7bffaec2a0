// Shapes of the ops that work on rows or flat vectors: swiglu, logprob, embed, gather and scatter, dropout, add, adamw,
// sum_sq.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/cases/tolerance.h"

namespace mm::cases {

struct SwigluCase {
  int64_t n, f;
  int offset = 0;
  float scale = 1.0f;  // of gate and up
  std::string name() const { return fmt::format("n{} f{} offset{} scale{}", n, f, offset, scale); }
  double floor() const {  // act is at most gate * up
    return rounding(4 * (1.0 + static_cast<double>(scale * scale)));
  }
};

inline const SwigluCase swiglu_cases[] = {
    {0, 5}, {1, 1}, {1, 2432}, {3, 7, 1}, {5, 17}, {13, 31, 1}, {4, 33, 0, 20.0f}, {9, 127, 1, 60.0f}, {37, 832},
};

struct LogprobCase {
  int64_t n, v;
  int offset = 0;
  float scale = 1.0f;  // of the logits
  bool sure = false;   // all logits around 64, the target well above the rest: log-probabilities near 0
  double size() const { return (sure ? 64 : 1) + 5 * static_cast<double>(scale); }  // most |logits| stay below
  std::string name() const { return fmt::format("n{} v{} offset{} scale{} sure{}", n, v, offset, scale, sure); }
  double floor_lse() const { return rounding(size()); }
  // A log-probability near 0 must not carry the rounding of a large logit: PPO and GRPO exponentiate differences of it.
  double floor_logp() const { return rounding(sure ? 1 : size()); }
  double floor_grad() const { return rounding(size()); }  // g exp(x - lse): the relative error is the rounding of lse
};

inline const LogprobCase logprob_cases[] = {
    {0, 5},
    {1, 1},
    {1, 2, 1},
    {2, 17},
    {3, 31, 1, 8.0f},
    {7, 127},
    {5, 6400, 1},
    {4, 6400, 0, 30.0f},
    {67, 33, 1},
    {6, 6400, 0, 1.0f, true},
    {5, 6400, 1, 10.0f, true},
    {13, 31, 0, 1.0f, true},
};

struct RowsCase {
  int64_t n, d, n_table;  // n rows picked from n_table
  int offset = 0;
  std::string name() const { return fmt::format("n{} d{} table{} offset{}", n, d, n_table, offset); }
};

inline const RowsCase rows_cases[] = {
    {0, 4, 3}, {1, 1, 1}, {2, 17, 5, 1}, {17, 31, 7}, {37, 64, 11, 1}, {131, 127, 13}, {97, 768, 6400}, {64, 33, 64, 1},
};

struct VectorCase {
  int64_t n;
  int offset = 0;
  std::string name() const { return fmt::format("n{} offset{}", n, offset); }
};

inline const VectorCase vector_cases[] = {
    {0}, {1}, {2, 1}, {3}, {7, 1}, {15}, {16}, {17, 1}, {31}, {127, 1}, {4099}, {16411, 1}, {70001}, {200003, 1},
};

}  // namespace mm::cases
