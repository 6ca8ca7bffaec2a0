// The specification of every op: plain loops, no threads. T is the type of the data, Acc that of sums and intermediate
// values. The ref device runs <float> (double sums); tests run <double> as the exact value and for gradient checks, and
// <float, float> as the plain implementation whose error sets the tolerance of a kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/rng.h"
#include "kernels/kernel_table.h"

namespace mm::ref {

// y = x w^T
template <class T, class Acc = double>
void linear_fwd(T* y, int64_t ldy, const T* x, int64_t ldx, const T* w, int64_t m, int64_t n, int64_t k,
                bool accumulate, bool /*bf16*/) {
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) {
      Acc s = 0;
      for (int64_t l = 0; l < k; l++) s += static_cast<Acc>(x[i * ldx + l]) * w[j * k + l];
      y[i * ldy + j] = static_cast<T>(accumulate ? y[i * ldy + j] + s : s);
    }
  }
}

template <class T, class Acc = double>
void linear_bwd(T* dx, int64_t lddx, T* dw, const T* dy, int64_t lddy, const T* x, int64_t ldx, const T* w, int64_t m,
                int64_t n, int64_t k, bool accumulate_dx, bool /*bf16*/) {
  for (int64_t i = 0; dx != nullptr && i < m; i++) {
    for (int64_t l = 0; l < k; l++) {
      Acc s = 0;
      for (int64_t j = 0; j < n; j++) s += static_cast<Acc>(dy[i * lddy + j]) * w[j * k + l];
      dx[i * lddx + l] = static_cast<T>(accumulate_dx ? dx[i * lddx + l] + s : s);
    }
  }
  for (int64_t j = 0; dw != nullptr && j < n; j++) {
    for (int64_t l = 0; l < k; l++) {
      Acc s = 0;
      for (int64_t i = 0; i < m; i++) s += static_cast<Acc>(dy[i * lddy + j]) * x[i * ldx + l];
      dw[j * k + l] += static_cast<T>(s);
    }
  }
}

template <class T>
void gather_rows(T* out, const T* x, const int32_t* rows, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i++) std::copy_n(x + rows[i] * d, d, out + i * d);
}

template <class T>
void scatter_rows(T* out, const T* x, const int32_t* rows, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; i++) std::copy_n(x + i * d, d, out + rows[i] * d);
}

template <class T>
void embed_fwd(T* out, const T* table, const int32_t* ids, int64_t n, int64_t d) {
  gather_rows(out, table, ids, n, d);
}

template <class T>
void embed_bwd(T* dtable, const T* dout, const int32_t* ids, int64_t n, int64_t d) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t i = 0; i < d; i++) dtable[ids[t] * d + i] += dout[t * d + i];
  }
}

template <class T, class Acc = double>
Acc inv_rms(const T* x, int64_t d, float eps) {
  Acc s = 0;
  for (int64_t i = 0; i < d; i++) s += static_cast<Acc>(x[i]) * x[i];
  return Acc{1} / std::sqrt(s / static_cast<Acc>(d) + eps);
}

// y = x / sqrt(mean(x^2) + eps) * w
template <class T, class Acc = double>
void rmsnorm_fwd(T* y, T* rstd, const T* x, const T* w, float eps, int64_t n, int64_t d) {
  for (int64_t t = 0; t < n; t++) {
    const Acc r = inv_rms<T, Acc>(x + t * d, d, eps);
    for (int64_t i = 0; i < d; i++) y[t * d + i] = static_cast<T>(x[t * d + i] * r * w[i]);
    if (rstd != nullptr) rstd[t] = static_cast<T>(r);
  }
}

// One row of the backward: dx_out = r (w dy - xhat mean(w dy xhat)), dw += dy xhat
template <class T, class Acc = double>
void norm_row_bwd(T* dx, bool accumulate, T* dw, const T* dy, const T* x, Acc r, const T* w, int64_t d) {
  Acc c = 0;
  for (int64_t i = 0; i < d; i++) c += static_cast<Acc>(dy[i]) * w[i] * x[i] * r;
  c /= static_cast<Acc>(d);
  for (int64_t i = 0; i < d; i++) {
    const Acc xhat = x[i] * r, g = r * (static_cast<Acc>(dy[i]) * w[i] - xhat * c);
    dw[i] += static_cast<T>(dy[i] * xhat);
    dx[i] = static_cast<T>(accumulate ? dx[i] + g : g);
  }
}

template <class T, class Acc = double>
void rmsnorm_bwd(T* dx, T* dw, const T* dy, const T* x, const T* rstd, const T* w, int64_t n, int64_t d) {
  for (int64_t t = 0; t < n; t++) norm_row_bwd<T, Acc>(dx + t * d, true, dw, dy + t * d, x + t * d, rstd[t], w, d);
}

// Optional RMSNorm over the head, then (a, b) -> (a cos - b sin, b cos + a sin) on pairs (i, i + d_head / 2)
template <class T, class Acc>
void norm_rope_head(T* y, const T* x, const T* w, const NormRopeArgs& a, int64_t t) {
  const int half = a.d_head / 2;
  const Acc r = w != nullptr ? inv_rms<T, Acc>(x, a.d_head, a.eps) : Acc{1};
  for (int i = 0; i < half; i++) {
    const Acc c = a.cos[a.positions[t] * half + i], s = a.sin[a.positions[t] * half + i];
    const Acc p = x[i] * r * (w != nullptr ? w[i] : 1), q = x[i + half] * r * (w != nullptr ? w[i + half] : 1);
    y[i] = static_cast<T>(p * c - q * s);
    y[i + half] = static_cast<T>(q * c + p * s);
  }
}

// The float table passes NormRopeArgs; q_weight and k_weight come apart so that double works too.
template <class T, class Acc = double>
void qk_norm_rope_fwd(T* q_out, T* k_out, int64_t ldk, T* v_out, int64_t ldv, const int64_t* slots, const T* qkv,
                      const T* q_weight, const T* k_weight, const NormRopeArgs& a) {
  const int64_t dh = a.d_head, width = (a.n_head + 2 * a.n_kv_head) * dh;
  for (int64_t t = 0; t < a.n; t++) {
    const int64_t row = slots != nullptr ? slots[t] : t;
    const T* x = qkv + t * width;
    for (int h = 0; h < a.n_head; h++)
      norm_rope_head<T, Acc>(q_out + (t * a.n_head + h) * dh, x + h * dh, q_weight, a, t);
    for (int h = 0; h < a.n_kv_head; h++)
      norm_rope_head<T, Acc>(k_out + row * ldk + h * dh, x + (a.n_head + h) * dh, k_weight, a, t);
    if (v_out != nullptr) std::copy_n(x + (a.n_head + a.n_kv_head) * dh, a.n_kv_head * dh, v_out + row * ldv);
  }
}

template <class T, class Acc = double>
void qk_norm_rope_bwd(T* dqkv, T* dq_weight, T* dk_weight, const T* qkv, const T* q_weight, const T* k_weight,
                      const NormRopeArgs& a) {
  const int64_t dh = a.d_head, width = (a.n_head + 2 * a.n_kv_head) * dh;
  const int half = a.d_head / 2;
  std::vector<T> unrotated(static_cast<size_t>(dh));
  for (int64_t t = 0; t < a.n; t++) {
    for (int h = 0; h < a.n_head + a.n_kv_head; h++) {
      T* d = dqkv + t * width + h * dh;
      const T *x = qkv + t * width + h * dh, *w = h < a.n_head ? q_weight : k_weight;
      for (int i = 0; i < half; i++) {
        const Acc c = a.cos[a.positions[t] * half + i], s = a.sin[a.positions[t] * half + i];
        unrotated[static_cast<size_t>(i)] = static_cast<T>(d[i] * c + d[i + half] * s);
        unrotated[static_cast<size_t>(i) + static_cast<size_t>(half)] = static_cast<T>(d[i + half] * c - d[i] * s);
      }
      if (w != nullptr)
        norm_row_bwd<T, Acc>(d, false, h < a.n_head ? dq_weight : dk_weight, unrotated.data(), x,
                             inv_rms<T, Acc>(x, dh, a.eps), w, dh);
      else std::copy_n(unrotated.data(), dh, d);
    }
  }
}

template <class T, class Acc = double>
void swiglu_fwd(T* act, const T* gate_up, int64_t n, int64_t f) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t i = 0; i < f; i++) {
      const Acc g = gate_up[t * 2 * f + i], u = gate_up[t * 2 * f + f + i];
      act[t * f + i] = static_cast<T>(g / (Acc{1} + std::exp(-g)) * u);
    }
  }
}

template <class T, class Acc = double>
void swiglu_bwd(T* dgate_up, const T* dact, const T* gate_up, int64_t n, int64_t f) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t i = 0; i < f; i++) {
      const Acc g = gate_up[t * 2 * f + i], u = gate_up[t * 2 * f + f + i], s = Acc{1} / (Acc{1} + std::exp(-g)),
                da = dact[t * f + i];
      dgate_up[t * 2 * f + i] = static_cast<T>(da * u * s * (Acc{1} + g * (Acc{1} - s)));
      dgate_up[t * 2 * f + f + i] = static_cast<T>(da * g * s);
    }
  }
}

template <class T, class Acc = double>
void logprob_fwd(T* logp, T* lse, const T* logits, const int32_t* targets, int64_t n, int64_t v) {
  for (int64_t t = 0; t < n; t++) {
    const T* x = logits + t * v;
    const Acc m = *std::max_element(x, x + v);
    Acc s = 0;
    for (int64_t i = 0; i < v; i++) s += std::exp(x[i] - m);
    lse[t] = static_cast<T>(m + std::log(s));
    logp[t] = static_cast<T>(x[targets[t]] - m - std::log(s));
  }
}

template <class T, class Acc = double>
void logprob_bwd(T* logits, const T* lse, const T* g, const int32_t* targets, int64_t n, int64_t v) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t i = 0; i < v; i++) {
      T& x = logits[t * v + i];
      x = static_cast<T>(g[t] * ((i == targets[t] ? Acc{1} : Acc{0}) - std::exp(static_cast<Acc>(x) - lse[t])));
    }
  }
}

inline double keep_factor(float p, uint64_t seed, uint64_t stream, uint64_t block, int64_t i) {
  if (p <= 0) return 1.0;
  const auto r = philox4x32(seed, stream, block);
  return to_unit_float(r[static_cast<size_t>(i & 3)]) < p ? 0.0 : 1.0 / (1.0 - p);
}

template <class T>
void dropout(T* x, float p, uint64_t seed, uint64_t stream, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    x[i] = static_cast<T>(x[i] * keep_factor(p, seed, stream, static_cast<uint64_t>(i / 4), i));
}

template <class T>
void add(T* y, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

// scores p = softmax(logits); weights w_j = p of the k best, divided by their sum when norm
template <class T, class Acc = double>
void moe_route_fwd(T* scores, int32_t* experts, T* weights, const T* logits, int64_t n, int n_expert, int top_k,
                   bool norm) {
  for (int64_t t = 0; t < n; t++) {
    const T* x = logits + t * n_expert;
    T* p = scores + t * n_expert;
    const Acc m = *std::max_element(x, x + n_expert);
    Acc s = 0;
    for (int e = 0; e < n_expert; e++) s += std::exp(x[e] - m);
    for (int e = 0; e < n_expert; e++) p[e] = static_cast<T>(std::exp(x[e] - m) / s);
    std::vector<int32_t> order(static_cast<size_t>(n_expert));
    for (int e = 0; e < n_expert; e++) order[static_cast<size_t>(e)] = e;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return p[a] > p[b]; });
    Acc sum = 0;
    for (int j = 0; j < top_k; j++) sum += p[order[static_cast<size_t>(j)]];
    for (int j = 0; j < top_k; j++) {
      experts[t * top_k + j] = order[static_cast<size_t>(j)];
      weights[t * top_k + j] = static_cast<T>(p[order[static_cast<size_t>(j)]] / (norm ? sum + Acc{1e-20f} : Acc{1}));
    }
  }
}

template <class T, class Acc = double>
void moe_route_bwd(T* dlogits, const T* dweights, const T* daux, const T* scores, const int32_t* experts, int64_t n,
                   int n_expert, int top_k, bool norm) {
  std::vector<Acc> dp(static_cast<size_t>(n_expert));
  for (int64_t t = 0; t < n; t++) {
    const T* p = scores + t * n_expert;
    const int32_t* chosen = experts + t * top_k;
    Acc sum = Acc{1e-20f}, weighted = 0, inner = 0;
    for (int j = 0; j < top_k; j++)
      sum += p[chosen[j]], weighted += static_cast<Acc>(dweights[t * top_k + j]) * p[chosen[j]];
    for (int e = 0; e < n_expert; e++) dp[static_cast<size_t>(e)] = daux[e];
    for (int j = 0; j < top_k; j++) {
      const Acc dw = dweights[t * top_k + j];
      dp[static_cast<size_t>(chosen[j])] += norm ? dw / sum - weighted / (sum * sum) : dw;
    }
    for (int e = 0; e < n_expert; e++) inner += p[e] * dp[static_cast<size_t>(e)];
    for (int e = 0; e < n_expert; e++)
      dlogits[t * n_expert + e] = static_cast<T>(p[e] * (dp[static_cast<size_t>(e)] - inner));
  }
}

template <class T>
void moe_combine_fwd(T* out, const T* y, const int32_t* slot, const T* weights, int64_t n, int top_k, int64_t d) {
  for (int64_t i = 0; i < n * top_k; i++) {
    for (int64_t c = 0; c < d; c++) out[i / top_k * d + c] += weights[i] * y[slot[i] * d + c];
  }
}

template <class T, class Acc = double>
void moe_combine_bwd(T* dy, T* dweights, const T* dout, const T* y, const int32_t* slot, const T* weights, int64_t n,
                     int top_k, int64_t d) {
  for (int64_t i = 0; i < n * top_k; i++) {
    Acc s = 0;
    for (int64_t c = 0; c < d; c++) {
      s += static_cast<Acc>(dout[i / top_k * d + c]) * y[slot[i] * d + c];
      dy[slot[i] * d + c] = weights[i] * dout[i / top_k * d + c];
    }
    dweights[i] = static_cast<T>(s);
  }
}

template <class T, class Acc = double>
void scatter_add(T* out, const T* x, const int32_t* slot, int64_t n, int top_k, int64_t d) {
  for (int64_t t = 0; t < n; t++) {
    for (int64_t c = 0; c < d; c++) {
      Acc s = 0;
      for (int j = 0; j < top_k; j++) s += x[slot[t * top_k + j] * d + c];
      out[t * d + c] = static_cast<T>(s);
    }
  }
}

template <class T, class Acc = double>
void adamw(T* p, const T* g, T* m, T* v, const AdamWArgs& a, int64_t n) {
  const auto step = static_cast<double>(a.step);
  const auto c1 = static_cast<Acc>(1.0 - std::pow(a.beta1, step)), c2 = static_cast<Acc>(1.0 - std::pow(a.beta2, step)),
             beta1 = static_cast<Acc>(a.beta1), beta2 = static_cast<Acc>(a.beta2),
             rest1 = static_cast<Acc>(1.0 - a.beta1), rest2 = static_cast<Acc>(1.0 - a.beta2),
             lr = static_cast<Acc>(a.lr), keep = static_cast<Acc>(1.0 - a.lr * a.weight_decay),
             eps = static_cast<Acc>(a.eps);
  for (int64_t i = 0; i < n; i++) {
    const Acc gi = static_cast<Acc>(g[i]) * a.grad_scale;
    m[i] = static_cast<T>(beta1 * m[i] + rest1 * gi);
    v[i] = static_cast<T>(beta2 * v[i] + rest2 * gi * gi);
    p[i] = static_cast<T>(p[i] * keep - lr / c1 * m[i] / (std::sqrt(v[i] / c2) + eps));
  }
}

template <class T>
double sum_sq(const T* x, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += static_cast<double>(x[i]) * x[i];
  return s;
}

}  // namespace mm::ref
