// The specification of attention: every score written out. T and Acc as in ref_ops.h. See AttentionArgs for the meaning
// of the rows.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ref/ref_ops.h"

namespace mm::ref {

// Calls f(query row, head, key row of key 0, number of visible keys) for every query and head.
template <class F>
void for_each_query(const AttentionArgs& a, F&& f) {
  for (int64_t s = 0; s < a.n_seq; s++) {
    const int64_t q0 = a.cu[s], q_len = a.cu[s + 1] - q0;
    const int64_t kv0 = a.kv_start != nullptr ? a.kv_start[s] : q0, kv_len = a.kv_len != nullptr ? a.kv_len[s] : q_len;
    for (int64_t i = 0; i < q_len; i++) {
      for (int64_t h = 0; h < a.n_head; h++) f(q0 + i, h, kv0, kv_len - q_len + i + 1);
    }
  }
}

template <class T, class Acc = double>
std::vector<Acc> attention_weights(const AttentionArgs& a, const T* q, const T* k, int64_t row, int64_t h, int64_t kv0,
                                   int64_t n_key, Acc* lse) {
  const int64_t dh = a.d_head, kh = h / (a.n_head / a.n_kv_head);
  std::vector<Acc> p(static_cast<size_t>(n_key));
  Acc m = -std::numeric_limits<Acc>::infinity(), sum = 0;
  for (int64_t j = 0; j < n_key; j++) {
    Acc s = 0;
    for (int64_t c = 0; c < dh; c++)
      s += static_cast<Acc>(q[row * a.ldq + h * dh + c]) * k[(kv0 + j) * a.ldk + kh * dh + c];
    p[static_cast<size_t>(j)] = s * a.scale;
    m = std::max(m, s * a.scale);
  }
  for (Acc& x : p) sum += x = std::exp(x - m);
  for (Acc& x : p) x /= sum;
  *lse = m + std::log(sum);
  return p;
}

inline double attention_keep(const AttentionArgs& a, int64_t row, int64_t h, int64_t j) {
  return keep_factor(a.dropout, a.seed, a.stream,
                     static_cast<uint64_t>(row * a.n_head + h) << 32 | static_cast<uint64_t>(j / 4), j);
}

template <class T, class Acc = double>
void attention_fwd(const AttentionArgs& a, const T* q, const T* k, const T* v, T* out, T* lse_out) {
  const int64_t dh = a.d_head;
  for_each_query(a, [&](int64_t row, int64_t h, int64_t kv0, int64_t n_key) {
    const int64_t kh = h / (a.n_head / a.n_kv_head);
    Acc lse = 0;
    const std::vector<Acc> p = attention_weights<T, Acc>(a, q, k, row, h, kv0, n_key, &lse);
    for (int64_t c = 0; c < dh; c++) {
      Acc s = 0;
      for (int64_t j = 0; j < n_key; j++)
        s += p[static_cast<size_t>(j)] * static_cast<Acc>(attention_keep(a, row, h, j)) *
             v[(kv0 + j) * a.ldv + kh * dh + c];
      out[row * a.ldo + h * dh + c] = static_cast<T>(s);
    }
    if (lse_out != nullptr) lse_out[row * a.n_head + h] = static_cast<T>(lse);
  });
}

// dq, dk, dv must start as zeros in [row, head, d_head] order with distances lddq, lddk, lddv.
template <class T, class Acc = double>
void attention_bwd(const AttentionBwdArgs& b, const T* q, const T* k, const T* v, const T* dout, T* dq, T* dk, T* dv) {
  const AttentionArgs& a = b.fwd;
  const int64_t dh = a.d_head;
  for_each_query(a, [&](int64_t row, int64_t h, int64_t kv0, int64_t n_key) {
    const int64_t kh = h / (a.n_head / a.n_kv_head);
    Acc lse = 0, delta = 0;
    const std::vector<Acc> p = attention_weights<T, Acc>(a, q, k, row, h, kv0, n_key, &lse);
    std::vector<Acc> dp(p.size());
    for (int64_t j = 0; j < n_key; j++) {
      const auto keep = static_cast<Acc>(attention_keep(a, row, h, j));
      Acc s = 0;
      for (int64_t c = 0; c < dh; c++) {
        const Acc g = dout[row * b.lddout + h * dh + c];
        s += g * v[(kv0 + j) * a.ldv + kh * dh + c];
        dv[(kv0 + j) * b.lddv + kh * dh + c] += static_cast<T>(p[static_cast<size_t>(j)] * keep * g);
      }
      dp[static_cast<size_t>(j)] = s * keep;
      delta += p[static_cast<size_t>(j)] * s * keep;
    }
    for (int64_t j = 0; j < n_key; j++) {
      const Acc ds = p[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta) * a.scale;
      for (int64_t c = 0; c < dh; c++) {
        dq[row * b.lddq + h * dh + c] += static_cast<T>(ds * k[(kv0 + j) * a.ldk + kh * dh + c]);
        dk[(kv0 + j) * b.lddk + kh * dh + c] += static_cast<T>(ds * q[row * a.ldq + h * dh + c]);
      }
    }
  });
}

}  // namespace mm::ref
