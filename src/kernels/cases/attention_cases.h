// Shapes of attention over packed sequences, with and without a cache of earlier keys.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cases/tolerance.h"

namespace mm::cases {

struct AttentionCase {
  std::vector<int32_t> q_len;  // of each sequence
  std::vector<int32_t> past;   // keys before the first query, of each sequence; empty: keys are the queries' rows
  int n_head, n_kv_head, d_head;
  float dropout = 0;
  int64_t pad = 0;  // between rows of q, k, v, out and their gradients
  int offset = 0;
  bool lse = true;  // false: no backward follows, a.lse is null
  int64_t n() const { return std::accumulate(q_len.begin(), q_len.end(), int64_t{0}); }
  std::string name() const {
    return fmt::format("q[{}] past[{}] heads{}/{} d{} dropout{} pad{} offset{}", fmt::join(q_len, ","),
                       fmt::join(past, ","), n_head, n_kv_head, d_head, dropout, pad, offset);
  }
  double longest() const {
    int32_t most = 1;
    for (size_t s = 0; s < q_len.size(); s++) most = std::max(most, q_len[s] + (past.empty() ? 0 : past[s]));
    return most;
  }
  // Outputs are averages of N(0, 1) values; with dropout the kept ones grow.
  double floor_out() const { return rounding(4 / (1 - static_cast<double>(dropout))); }
  double floor_lse() const { return rounding(4 + std::log(longest())); }
  // A key's gradient sums the queries of its group: at most group * longest terms of size <= 1.
  double floor_grad() const {
    return rounding(4 / (1 - static_cast<double>(dropout)) * std::sqrt(longest() * n_head / n_kv_head));
  }
};

inline const AttentionCase attention_cases[] = {
    {{1}, {}, 1, 1, 32},
    {{0}, {}, 2, 1, 32},
    {{2}, {}, 4, 2, 64, 0, 3, 1},
    {{3}, {}, 4, 4, 32},                   // MHA
    {{5, 1, 0, 7}, {}, 8, 2, 64},          // GQA, lengths 0 and 1 among others
    {{1, 1, 1}, {}, 4, 1, 96},             // MQA
    {{17}, {}, 3, 1, 6, 0, 1, 1},          // odd everything
    {{63, 2, 66}, {}, 4, 2, 32, 0, 0, 1},  // around the row block
    {{64, 65}, {}, 2, 1, 128},
    {{131, 1, 37}, {}, 8, 4, 96},  // MiniMind-3 heads
    {{97}, {}, 2, 2, 64, 0.1f},
    {{5, 64, 3}, {}, 4, 2, 32, 0.3f, 7, 1},
    {{257}, {}, 2, 1, 64, 0, 64},
};

// Forward only: more keys than queries.
inline const AttentionCase kv_cache_cases[] = {
    {{1}, {0}, 4, 2, 64, 0, 0, 0, false},                // the first decode step
    {{1}, {1000}, 8, 2, 64, 0, 0, 0, false},             // one decode step
    {{1, 1, 1}, {5, 0, 130}, 8, 4, 96, 0, 3, 1, false},  // a batch of them
    {{2}, {13}, 4, 1, 32},                               // two rows: still dot products
    {{3}, {64}, 4, 4, 128, 0, 0, 1},
    {{5, 1, 67}, {7, 300, 61}, 8, 4, 96},  // chunked prefill beside decode
    {{1, 9}, {20, 30}, 4, 2, 64, 0.2f, 5},
};

}  // namespace mm::cases
