// Shapes of the mixture-of-experts ops.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/cases/tolerance.h"

namespace mm::cases {

struct MoeCase {
  int64_t n;
  int n_expert, top_k;
  int64_t d;
  bool norm = true;  // the chosen weights are divided by their sum
  int unused = -1;   // an expert that no token chooses
  int offset = 0;
  std::string name() const {
    return fmt::format("n{} experts{} top{} d{} norm{} unused{} offset{}", n, n_expert, top_k, d, norm, unused, offset);
  }
  double floor_scores() const { return rounding(1); }
  double floor_dlogits() const { return rounding(8); }  // dweights / sum of the chosen scores
  double floor_out() const { return rounding(4); }
  double floor_dweights() const { return rounding(4 * std::sqrt(static_cast<double>(d))); }
};

inline const MoeCase moe_cases[] = {
    {0, 4, 2, 8},
    {1, 1, 1, 1},
    {1, 4, 1, 17, true, -1, 1},
    {2, 4, 2, 31, false},
    {13, 4, 4, 64},
    {37, 4, 1, 768, true, 2},
    {67, 7, 3, 33, false, 0, 1},
    {131, 16, 2, 127, true, 5},
    {257, 64, 6, 48, true, -1, 1},
    {19, 5, 2, 96, false, 4},
};

}  // namespace mm::cases
