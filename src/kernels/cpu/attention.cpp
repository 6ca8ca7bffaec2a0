// Causal attention over packed sequences, grouped-query heads.
//
//   S = scale Q K^T (masked), P = softmax(S), O = P V
//   dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)) scale, dQ = dS K, dK = dS^T Q
//
// Work split: forward, one task a (sequence, head, block of query rows); backward, one task a (sequence, kv head),
// which owns its rows of dK and dV, so nothing is summed across threads and the result does not depend on their number.
// Inside a task blocks of query rows meet all keys they may see: scores of one block stay in L2, P is recomputed in
// backward from the saved log-sum-exp. Floor: 4 d_head (forward) and 10 d_head (backward) operations a visible (query,
// key) pair and head.
#include <algorithm>
#include <vector>

#include "base/rng.h"
#include "base/thread_team.h"
#include "kernels/cpu/drivers.h"

namespace mm::cpu {

namespace {

constexpr int64_t block_rows = 64;

struct Task {
  int64_t seq, head, first, rows;  // query rows [first, first + rows) within the sequence
};

// Multiplies row elements by 0 or 1 / (1 - p); counter-based, so backward repeats forward's choice.
void drop_row(float* x, const AttentionArgs& a, int64_t row, int64_t head, int64_t n) {
  const float keep = 1.0f / (1.0f - a.dropout);
  const uint64_t base = static_cast<uint64_t>(row * a.n_head + head) << 32;
  for (int64_t j = 0; j < n; j += 4) {
    const auto r = philox4x32(a.seed, a.stream, base | static_cast<uint64_t>(j / 4));
    for (int64_t i = j; i < std::min(j + 4, n); i++)
      x[i] *= to_unit_float(r[static_cast<size_t>(i - j)]) < a.dropout ? 0.0f : keep;
  }
}

void forward_block(const AttentionArgs& a, const Task& task) {
  const int64_t q0 = a.cu[task.seq] + task.first, q_len = a.cu[task.seq + 1] - a.cu[task.seq];
  const int64_t kv_len = a.kv_len ? a.kv_len[task.seq] : q_len,
                kv0 = a.kv_start ? a.kv_start[task.seq] : a.cu[task.seq];
  const int64_t dh = a.d_head, kv_head = task.head / (a.n_head / a.n_kv_head);
  const int64_t past = kv_len - q_len, cols = past + task.first + task.rows;  // keys the last row of the block sees
  const float* q = a.q + q0 * a.ldq + task.head * dh;
  const float* k = a.k + kv0 * a.ldk + kv_head * dh;
  const float* v = a.v + kv0 * a.ldv + kv_head * dh;
  float* out = a.out + q0 * a.ldo + task.head * dh;
  float* s = thread_scratch(2, static_cast<size_t>(task.rows * cols));
  float inv_sum[block_rows];
  const bool few = task.rows <= 2;  // decode: dot products beat a matrix product of one row
  if (few) {
    for (int64_t i = 0; i < task.rows; i++) {
      for (int64_t j = 0; j < cols; j++) s[i * cols + j] = a.scale * simd().dot(q + i * a.ldq, k + j * a.ldk, dh);
    }
  } else {
    sgemm(false, true, task.rows, cols, dh, a.scale, q, a.ldq, k, a.ldk, 0.0f, s, cols);
  }
  for (int64_t i = 0; i < task.rows; i++) {
    float lse = 0;
    simd().softmax_row(s + i * cols, past + task.first + i + 1, cols, &lse, &inv_sum[i]);
    if (a.lse != nullptr) a.lse[(q0 + i) * a.n_head + task.head] = lse;
    if (a.dropout > 0) drop_row(s + i * cols, a, q0 + i, task.head, cols);
  }
  if (few) {
    for (int64_t i = 0; i < task.rows; i++) {
      std::fill_n(out + i * a.ldo, dh, 0.0f);
      for (int64_t j = 0; j < cols; j++) simd().axpy(out + i * a.ldo, s[i * cols + j], v + j * a.ldv, dh);
    }
  } else {
    sgemm(false, false, task.rows, dh, cols, 1.0f, s, cols, v, a.ldv, 0.0f, out, a.ldo);
  }
  for (int64_t i = 0; i < task.rows; i++) simd().scale(out + i * a.ldo, inv_sum[i], dh);
}

void backward_task(const AttentionBwdArgs& b, int64_t seq, int64_t kv_head) {
  const AttentionArgs& a = b.fwd;
  const int64_t q0 = a.cu[seq], len = a.cu[seq + 1] - q0, dh = a.d_head, group = a.n_head / a.n_kv_head;
  const float *k = a.k + q0 * a.ldk + kv_head * dh, *v = a.v + q0 * a.ldv + kv_head * dh;
  float *dk = b.dk + q0 * b.lddk + kv_head * dh, *dv = b.dv + q0 * b.lddv + kv_head * dh;
  for (int64_t j = 0; j < len; j++) {
    std::fill_n(dk + j * b.lddk, dh, 0.0f);
    std::fill_n(dv + j * b.lddv, dh, 0.0f);
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int64_t first = 0; first < len; first += block_rows) {
      const int64_t rows = std::min(block_rows, len - first), cols = first + rows, row0 = q0 + first;
      const float* q = a.q + row0 * a.ldq + head * dh;
      const float* out = a.out + row0 * a.ldo + head * dh;
      const float* dout = b.dout + row0 * b.lddout + head * dh;
      float* s = thread_scratch(2, static_cast<size_t>(rows * cols));
      float* dp = thread_scratch(3, static_cast<size_t>(rows * cols));
      sgemm(false, true, rows, cols, dh, a.scale, q, a.ldq, k, a.ldk, 0.0f, s, cols);
      sgemm(false, true, rows, cols, dh, 1.0f, dout, b.lddout, v, a.ldv, 0.0f, dp, cols);
      for (int64_t i = 0; i < rows; i++) {
        const float delta = simd().dot(dout + i * b.lddout, out + i * a.ldo, dh);
        if (a.dropout > 0) drop_row(dp + i * cols, a, row0 + i, head, cols);
        simd().softmax_row_bwd(s + i * cols, dp + i * cols, a.lse[(row0 + i) * a.n_head + head], delta, a.scale,
                               first + i + 1, cols);
        if (a.dropout > 0) drop_row(s + i * cols, a, row0 + i, head, cols);
      }
      sgemm(true, false, cols, dh, rows, 1.0f, s, cols, dout, b.lddout, 1.0f, dv, b.lddv);
      sgemm(false, false, rows, dh, cols, 1.0f, dp, cols, k, a.ldk, 0.0f, b.dq + row0 * b.lddq + head * dh, b.lddq);
      sgemm(true, false, cols, dh, rows, 1.0f, dp, cols, q, a.ldq, 1.0f, dk, b.lddk);
    }
  }
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  static thread_local std::vector<Task> tasks;
  tasks.clear();
  for (int64_t s = 0; s < a.n_seq; s++) {
    const int64_t len = a.cu[s + 1] - a.cu[s];
    for (int64_t first = (len - 1) / block_rows * block_rows; first >= 0; first -= block_rows) {  // long rows first
      for (int64_t h = 0; h < a.n_head; h++) tasks.push_back({s, h, first, std::min(block_rows, len - first)});
    }
  }
  const Task* list = tasks.data();
  parallel_dynamic(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) { forward_block(a, list[i]); });
}

void attention_bwd(const AttentionBwdArgs& b) {
  const AttentionArgs& a = b.fwd;
  static thread_local std::vector<Task> tasks;
  tasks.clear();
  for (int64_t s = 0; s < a.n_seq; s++) {
    for (int64_t h = 0; h < a.n_kv_head; h++) tasks.push_back({s, h, 0, a.cu[s + 1] - a.cu[s]});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.rows > y.rows; });
  const Task* list = tasks.data();
  parallel_dynamic(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
    if (list[i].rows > 0) backward_task(b, list[i].seq, list[i].head);
  });
}

}  // namespace mm::cpu
