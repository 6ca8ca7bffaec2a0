// Mixture-of-experts routing and the moves of rows between token order and expert order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/thread_team.h"
#include "kernels/cpu/drivers.h"

namespace mm::cpu {

void moe_route_fwd(float* scores, int32_t* experts, float* weights, const float* logits, int64_t n, int n_expert,
                   int top_k, bool norm) {
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* p = scores + t * n_expert;
      std::memcpy(p, logits + t * n_expert, static_cast<size_t>(n_expert) * sizeof(float));
      float inv = 0;
      simd().softmax_row(p, n_expert, n_expert, nullptr, &inv);
      simd().scale(p, inv, n_expert);
      int32_t* chosen = experts + t * top_k;
      float* w = weights + t * top_k;
      float sum = 0;
      for (int j = 0; j < top_k; j++) {  // repeated selection: E and k are small
        int best = -1;
        for (int e = 0; e < n_expert; e++) {
          if (std::find(chosen, chosen + j, e) == chosen + j && (best < 0 || p[e] > p[best])) best = e;
        }
        chosen[j] = best;
        w[j] = p[best];
        sum += w[j];
      }
      if (norm) {
        for (int j = 0; j < top_k; j++) w[j] /= sum + 1e-20f;
      }
    }
  });
}

// weights w_j = p_j / (S + eps), S = sum of the chosen p; scores p = softmax(logits).
void moe_route_bwd(float* dlogits, const float* dweights, const float* daux, const float* scores,
                   const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm) {
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float *p = scores + t * n_expert, *dw = dweights + t * top_k;
      const int32_t* chosen = experts + t * top_k;
      float* dp = dlogits + t * n_expert;
      std::memcpy(dp, daux, static_cast<size_t>(n_expert) * sizeof(float));
      float sum = 1e-20f, weighted = 0;
      for (int j = 0; j < top_k; j++) sum += p[chosen[j]], weighted += dw[j] * p[chosen[j]];
      weighted /= sum;  // mean of dw under the weights: for top_k = 1 the difference below is exactly 0
      for (int j = 0; j < top_k; j++) dp[chosen[j]] += norm ? (dw[j] - weighted) / sum : dw[j];
      const float inner = simd().dot(p, dp, n_expert);
      for (int e = 0; e < n_expert; e++) dp[e] = p[e] * (dp[e] - inner);
    }
  });
}

void gather_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      std::memcpy(out + i * d, x + rows[i] * d, static_cast<size_t>(d) * sizeof(float));
  });
}

void scatter_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      std::memcpy(out + rows[i] * d, x + i * d, static_cast<size_t>(d) * sizeof(float));
  });
}

void moe_combine_fwd(float* out, const float* y, const int32_t* slot, const float* weights, int64_t n, int top_k,
                     int64_t d) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      for (int j = 0; j < top_k; j++) simd().axpy(out + t * d, weights[t * top_k + j], y + slot[t * top_k + j] * d, d);
    }
  });
}

void moe_combine_bwd(float* dy, float* dweights, const float* dout, const float* y, const int32_t* slot,
                     const float* weights, int64_t n, int top_k, int64_t d) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      for (int64_t i = t * top_k; i < (t + 1) * top_k; i++) {
        dweights[i] = simd().dot(dout + t * d, y + slot[i] * d, d);
        float* row = dy + slot[i] * d;
        std::memcpy(row, dout + t * d, static_cast<size_t>(d) * sizeof(float));
        simd().scale(row, weights[i], d);
      }
    }
  });
}

void scatter_add(float* out, const float* x, const int32_t* slot, int64_t n, int top_k, int64_t d) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      std::memcpy(out + t * d, x + slot[t * top_k] * d, static_cast<size_t>(d) * sizeof(float));
      for (int j = 1; j < top_k; j++) simd().axpy(out + t * d, 1.0f, x + slot[t * top_k + j] * d, d);
    }
  });
}

}  // namespace mm::cpu
