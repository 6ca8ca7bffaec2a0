// The parts of a mixture of experts that are small enough for one host thread.
#pragma once

#include <cstdint>

namespace mm {

// See ops::moe_sort and ops::moe_balance.
void moe_sort_host(int32_t* slot, int32_t* rows, int32_t* offset, const int32_t* experts, int64_t pairs, int64_t top_k,
                   int64_t n_expert);
void moe_balance_host(double* aux, float* daux, float share, const float* scores, const int32_t* offset, int64_t n,
                      int64_t n_expert, double coef);

}  // namespace mm
