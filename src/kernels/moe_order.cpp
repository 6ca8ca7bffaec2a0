#include "kernels/moe_order.h"

#include <algorithm>
#include <vector>

namespace mm {

void moe_sort_host(int32_t* slot, int32_t* rows, int32_t* offset, const int32_t* experts, int64_t pairs, int64_t top_k,
                   int64_t n_expert) {
  std::fill_n(offset, n_expert + 1, 0);
  for (int64_t i = 0; i < pairs; i++) offset[experts[i] + 1]++;
  for (int64_t e = 0; e < n_expert; e++) offset[e + 1] += offset[e];
  std::vector<int32_t> next(offset, offset + n_expert);
  for (int64_t i = 0; i < pairs; i++) {
    const int32_t row = next[static_cast<size_t>(experts[i])]++;
    slot[i] = row;
    rows[row] = static_cast<int32_t>(i / top_k);
  }
}

void moe_balance_host(double* aux, float* daux, float share, const float* scores, const int32_t* offset, int64_t n,
                      int64_t n_expert, double coef) {
  double loss = 0;
  for (int64_t e = 0; e < n_expert; e++) {
    double mean = 0;
    for (int64_t t = 0; t < n; t++) mean += scores[t * n_expert + e];
    mean /= static_cast<double>(n);
    const double load = static_cast<double>(offset[e + 1] - offset[e]) / static_cast<double>(n);
    const double scale = coef * static_cast<double>(n_expert) * load;
    loss += scale * mean;
    if (daux != nullptr) daux[e] = share * static_cast<float>(scale / static_cast<double>(n));
  }
  if (aux != nullptr) *aux += static_cast<double>(share) * loss;
}

}  // namespace mm
