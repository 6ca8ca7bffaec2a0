// The CUDA kernels of paged keys and values against plain references in double.
#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cases/cuda_arrays.h"
#include "kernels/cuda/infer_kernels.h"

namespace mm {
namespace {

using namespace cases;  // NOLINT(google-build-using-namespace)

using CudaInfer = CudaTest;
constexpr KvFormat formats[] = {KvFormat::f32, KvFormat::bf16, KvFormat::f16, KvFormat::i8};

// --- keys and values ----------------------------------------------------------------------------------------------
DType element(KvFormat f) {
  return f == KvFormat::f32 ? f32 : f == KvFormat::bf16 ? bf16 : f == KvFormat::f16 ? f16 : DType::i8;
}

// Keys or values of one layer in a format, filled with sentinels, and what they decode to.
struct Pool {
  KvFormat format;
  int64_t rows;
  int heads, width;
  Device<unsigned char> data;
  Device<float> scale;
  Pool(KvFormat f, int64_t n_rows, int n_heads, int d)
      : format(f),
        rows(n_rows),
        heads(n_heads),
        width(d),
        data(Bytes(static_cast<size_t>(n_rows * n_heads * d) * dtype_size(element(f)), 0x2a)),
        scale(std::vector<float>(f == KvFormat::i8 ? static_cast<size_t>(n_rows * n_heads) : 0, -5.0f)) {}
  void fill(const std::vector<float>& x) {  // [rows, heads, width]
    if (format != KvFormat::i8) return data.set(encode(element(format), x));
    Bytes q(x.size());
    std::vector<float> s(x.size() / static_cast<size_t>(width));
    for (size_t i = 0; i < s.size(); i++) {
      const float* from = &x[i * static_cast<size_t>(width)];
      float top = 0;
      for (int j = 0; j < width; j++) top = std::max(top, std::abs(from[j]));
      s[i] = top / 127.0f;
      for (int j = 0; j < width; j++)
        q[i * static_cast<size_t>(width) + static_cast<size_t>(j)] =
            static_cast<unsigned char>(static_cast<int8_t>(s[i] > 0 ? std::nearbyint(from[j] / s[i]) : 0));
    }
    data.set(q), scale.set(s);
  }
  std::vector<float> values() const {
    if (format != KvFormat::i8) return decode(element(format), data.get());
    const Bytes q = data.get();
    const std::vector<float> s = scale.get();
    std::vector<float> x(q.size());
    for (size_t i = 0; i < x.size(); i++)
      x[i] = static_cast<float>(static_cast<int8_t>(q[i])) * s[i / static_cast<size_t>(width)];
    return x;
  }
};
cuda::KvLayer layer(const Pool& k, const Pool& v) { return {k.format, k.data, v.data, k.scale, v.scale}; }

struct NormRopeCase {
  DType t;
  KvFormat format;
  int64_t n;
  int n_head, n_kv_head, d;
  bool norm, copies, nan;
};

void check_norm_rope(const NormRopeCase& c) {
  const auto what = std::string(dtype_name(c.t)) + " format " + std::to_string(static_cast<int>(c.format)) + " n " +
                    std::to_string(c.n) + " d " + std::to_string(c.d) + (c.norm ? " norm" : "");
  const int heads = c.n_head + 2 * c.n_kv_head, half = c.d / 2;
  const int64_t n_rows = 2 * c.n + 3;
  constexpr int64_t max_pos = 40;
  std::vector<float> x = rounded(c.t, normal(static_cast<size_t>(c.n * heads * c.d), 1, 2.0f));
  if (c.nan) x[static_cast<size_t>(c.n_head * c.d + 1)] = kNan;  // in the first key of token 0
  const std::vector<float> qw = rounded(c.t, normal(static_cast<size_t>(c.d), 2)),
                           kw = rounded(c.t, normal(static_cast<size_t>(c.d), 3)),
                           cos = normal(static_cast<size_t>(max_pos * half), 4),
                           sin = normal(static_cast<size_t>(max_pos * half), 5);
  std::vector<int32_t> positions, slots;
  for (int64_t i = 0; i < c.n; i++) {
    positions.push_back(static_cast<int32_t>(i * 7 % max_pos));
    slots.push_back(i % 5 == 3 ? -1 : static_cast<int32_t>((i * 2 + 5) % n_rows));
  }
  const auto q_size = static_cast<size_t>(c.n * c.n_head * c.d), kv_size = static_cast<size_t>(c.n * c.n_kv_head * c.d);
  Pool k(c.format, n_rows, c.n_kv_head, c.d), v(c.format, n_rows, c.n_kv_head, c.d);
  std::vector<double> want_k, want_v, want_q, want_k_out, want_v_out;
  for (const float y : k.values()) want_k.push_back(static_cast<double>(y));
  want_v = want_k;
  for (int64_t i = 0; i < c.n; i++) {
    for (int h = 0; h < heads; h++) {
      const float* from = &x[static_cast<size_t>((i * heads + h) * c.d)];
      const bool rotated = h < c.n_head + c.n_kv_head;
      std::vector<double> u(from, from + c.d), y(u);
      if (rotated && c.norm) {
        double sum = 0;
        for (const double e : u) sum += e * e;
        for (int j = 0; j < c.d; j++)
          u[static_cast<size_t>(j)] *=
              static_cast<double>((h < c.n_head ? qw : kw)[static_cast<size_t>(j)]) / std::sqrt(sum / c.d + 1e-6);
      }
      for (int j = 0; j < half && rotated; j++) {
        const auto a = static_cast<size_t>(j), b = static_cast<size_t>(j + half);
        const auto at = static_cast<size_t>(positions[static_cast<size_t>(i)] * half + j);
        const auto co = static_cast<double>(cos[at]), si = static_cast<double>(sin[at]);
        y[a] = u[a] * co - u[b] * si, y[b] = u[b] * co + u[a] * si;
      }
      if (h < c.n_head) {
        want_q.insert(want_q.end(), y.begin(), y.end());
        continue;
      }
      auto& copy = rotated ? want_k_out : want_v_out;
      copy.insert(copy.end(), y.begin(), y.end());
      const int32_t slot = slots[static_cast<size_t>(i)];
      const int kv_head = (h - c.n_head) % c.n_kv_head;
      if (slot < 0) continue;
      if (c.format == KvFormat::i8 && c.nan && h == c.n_head && i == 0) std::fill(y.begin(), y.end(), NAN);
      std::copy(y.begin(), y.end(), (rotated ? want_k : want_v).begin() + (slot * c.n_kv_head + kv_head) * c.d);
    }
  }
  const Device<unsigned char> qkv(encode(c.t, x)), q_weight(encode(c.t, qw)), k_weight(encode(c.t, kw)),
      q_out(Bytes(q_size * dtype_size(c.t))), k_out(Bytes(kv_size * dtype_size(c.t))),
      v_out(Bytes(kv_size * dtype_size(c.t)));
  const Device<float> cos_d(cos), sin_d(sin);
  const Device<int32_t> positions_d(positions), slots_d(slots);
  const cuda::NormRope a = {.q_weight = c.norm ? q_weight.pointer() : nullptr,
                            .k_weight = c.norm ? k_weight.pointer() : nullptr,
                            .cos = cos_d,
                            .sin = sin_d,
                            .positions = positions_d,
                            .n = c.n,
                            .n_head = c.n_head,
                            .n_kv_head = c.n_kv_head,
                            .d_head = c.d};
  cuda::paged_norm_rope(context(), c.t, q_out, layer(k, v), c.copies ? k_out.pointer() : nullptr,
                        c.copies ? v_out.pointer() : nullptr, slots_d, qkv, a);
  // Of int8: half a step of the head's scale, relative to its largest element.
  const auto expect_kv = [&](const char* name, const Pool& pool, std::vector<double>& want) {
    std::vector<float> got = pool.values();
    for (size_t i = 0; i < want.size() && c.format == KvFormat::i8; i += static_cast<size_t>(c.d)) {
      double top = 0;
      for (size_t j = i; j < i + static_cast<size_t>(c.d); j++) top = std::max(top, std::abs(want[j]));
      for (size_t j = i; j < i + static_cast<size_t>(c.d) && top > 0; j++)
        want[j] /= top, got[j] = static_cast<float>(static_cast<double>(got[j]) / top);
    }
    // relative to |want| + 1, and |want| is at most 1 here
    expect_close(what + name, got, want, c.format == KvFormat::i8 ? 0.51 / 127 : 1.5 * unit_of(element(c.format)), 1);
  };
  const double unit = unit_of(c.t);
  expect_close(what + " q", decode(c.t, q_out.get()), want_q, 1.5 * unit, 1);
  expect_kv(" k", k, want_k);
  expect_kv(" v", v, want_v);
  if (!c.copies) return;
  expect_close(what + " k_out", decode(c.t, k_out.get()), want_k_out, 1.5 * unit, 1);
  expect_close(what + " v_out", decode(c.t, v_out.get()), want_v_out, 1.5 * unit, 1);
}

TEST_F(CudaInfer, NormRopeIntoPages) {
  for (const DType t : types) {
    for (const KvFormat format : formats) {
      for (const int d : {32, 64, 96, 128, 48, 50}) check_norm_rope({t, format, 9, 4, 2, d, true, true, false});
      check_norm_rope({t, format, 1, 8, 4, 96, true, false, false});
      check_norm_rope({t, format, 700, 3, 1, 96, false, true, false});
      check_norm_rope({t, format, 3, 2, 2, 64, true, true, true});
      check_norm_rope({t, format, 3, 2, 2, 48, true, true, true});
    }
  }
}

TEST_F(CudaInfer, GatherAndCopyRows) {
  for (const KvFormat format : formats) {
    for (const int d : {96, 20}) {
      constexpr int heads = 2, shift = 2;
      constexpr int64_t rows = 64, layers = 3;
      // Three layers in one pool; the gather reads the second.
      Pool k(format, rows * layers, heads, d), v(format, rows * layers, heads, d);
      k.fill(normal(static_cast<size_t>(rows * layers * heads * d), 11));
      v.fill(normal(static_cast<size_t>(rows * layers * heads * d), 12));
      const int64_t stride = rows * heads * d;
      const std::vector<int32_t> start = {0, 5, 5, 14, 15}, table = {40, 8, -1, -1, -1, -1, 0, 52, 20, 4, -1, -1};
      const Device<int32_t> start_d(start), table_d(table);
      for (const DType t : types) {
        constexpr int64_t n_rows = 17;  // two more than there are
        const auto size = static_cast<size_t>(n_rows * heads * d);
        const Device<unsigned char> k_out(Bytes(size * dtype_size(t), 0x2a)), v_out(Bytes(size * dtype_size(t), 0x2a));
        const auto bytes = static_cast<int64_t>(dtype_size(element(format)));
        const cuda::KvLayer second = {format, k.data + stride * bytes, v.data + stride * bytes,
                                      format == KvFormat::i8 ? k.scale + stride / d : nullptr,
                                      format == KvFormat::i8 ? v.scale + stride / d : nullptr};
        cuda::kv_gather(context(), t, k_out, v_out, second, start_d, table_d, 3, shift, 4, n_rows, heads, d);
        const std::vector<float> untouched = decode(t, Bytes(size * dtype_size(t), 0x2a));
        for (const auto& [pool, out] : {std::pair(&k, &k_out), std::pair(&v, &v_out)}) {
          const std::vector<float> from = pool->values();
          std::vector<double> want(untouched.begin(), untouched.end());
          for (int64_t r = 0; r < 15; r++) {
            const int64_t s = r < 5 ? 0 : r < 14 ? 2 : 3, key = r - start[static_cast<size_t>(s)];
            const int64_t row = rows + table[static_cast<size_t>(s * 3 + (key >> shift))] + (key & 3);
            for (int64_t e = 0; e < heads * d; e++)
              want[static_cast<size_t>(r * heads * d + e)] =
                  static_cast<double>(from[static_cast<size_t>(row * heads * d + e)]);
          }
          expect_close("gather", decode(t, out->get()), want, unit_of(t), 1e-3);
        }
      }
      std::vector<float> want_k = k.values(), want_v = v.values();
      const std::vector<int32_t> from = {3, 50, 0}, to = {20, 30, 63}, count = {7, 12, 0};
      for (int64_t l = 0; l < layers; l++) {
        for (size_t i = 0; i < 3; i++) {
          for (auto* w : {&want_k, &want_v})
            std::copy_n(w->begin() + l * stride + from[i] * heads * d, count[i] * heads * d,
                        w->begin() + l * stride + to[i] * heads * d);
        }
      }
      const InferKv kv = {format, k.data, v.data, k.scale, v.scale, stride};
      cuda::kv_copy_rows(context(), kv, layers, Device<int32_t>(from), Device<int32_t>(to), Device<int32_t>(count), 3,
                         12, heads, d);
      EXPECT_EQ(k.values(), want_k);
      EXPECT_EQ(v.values(), want_v);
    }
  }
}

// --- attention over pages -----------------------------------------------------------------------------------------
struct AttentionCase {
  DType t;
  KvFormat format;
  int n_head, n_kv_head, d, shift;
  std::vector<int32_t> n_key;  // one row a sequence; 0: padding
  bool invariant = false;
  int nan_row = -1;  // its last key is NaN
  int n_new = 1 << 30;
};

struct AttentionRun {
  std::vector<float> got;
  std::vector<double> want;
};

// Rows of a batch, each a sequence of its own with shuffled pages; `rows` restricts the launch to some of them.
AttentionRun run_attention(const AttentionCase& c, const std::vector<int32_t>& rows, bool reference) {
  const int64_t block = int64_t{1} << c.shift;
  const auto n_seq = static_cast<int64_t>(c.n_key.size());
  const int64_t longest = *std::max_element(c.n_key.begin(), c.n_key.end()), table_ld = longest / block + 2,
                n_block = n_seq * table_ld;
  std::vector<int32_t> order(static_cast<size_t>(n_block)), table;
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[philox4x32(3, 1, i)[0] % i]);
  table.reserve(order.size());
  for (const int32_t b : order) table.push_back(static_cast<int32_t>(b * block));
  const auto row_of = [&](int64_t s, int64_t key) {
    return table[static_cast<size_t>(s * table_ld + key / block)] + key % block;
  };
  const int64_t pool_rows = n_block * block, kv_width = int64_t{c.n_kv_head} * c.d;
  Pool k(c.format, pool_rows, c.n_kv_head, c.d), v(c.format, pool_rows, c.n_kv_head, c.d);
  std::vector<float> k_values = normal(static_cast<size_t>(pool_rows * kv_width), 21),
                     v_values = normal(static_cast<size_t>(pool_rows * kv_width), 22);
  if (c.nan_row >= 0) {
    const int64_t at = row_of(c.nan_row, c.n_key[static_cast<size_t>(c.nan_row)] - 1) * kv_width;
    if (c.format == KvFormat::i8) {
      k.fill(k_values);
      std::vector<float> scale = k.scale.get();
      for (int h = 0; h < c.n_kv_head; h++) scale[static_cast<size_t>(at / c.d + h)] = kNan;
      k.scale.set(scale);
    } else {
      for (int64_t e = 0; e < kv_width; e++) k_values[static_cast<size_t>(at + e)] = kNan;
      k.fill(k_values);
    }
  } else {
    k.fill(k_values);
  }
  v.fill(v_values);
  const int64_t q_width = int64_t{c.n_head} * c.d;
  const std::vector<float> all_q = rounded(c.t, normal(static_cast<size_t>(n_seq * q_width), 23, 1.5f));
  std::vector<float> q;
  std::vector<int32_t> n_key;
  for (const int32_t r : rows) {
    q.insert(q.end(), all_q.begin() + r * q_width, all_q.begin() + (r + 1) * q_width);
    n_key.push_back(c.n_key[static_cast<size_t>(r)]);
  }
  const auto n_row = static_cast<int64_t>(rows.size());
  const Device<unsigned char> q_d(encode(c.t, q)), out(Bytes(q.size() * dtype_size(c.t), 0x2a));
  const Device<int32_t> seq_d(rows), n_key_d(n_key), table_d(table);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.d));
  const cuda::PagedAttention a = {.q = q_d,
                                  .out = out,
                                  .ldq = q_width,
                                  .ldo = q_width,
                                  .seq = seq_d,
                                  .n_key = n_key_d,
                                  .table = table_d,
                                  .table_ld = table_ld,
                                  .block_shift = c.shift,
                                  .n_row = n_row,
                                  .max_key = longest,
                                  .n_new = c.n_new,
                                  .invariant = c.invariant,
                                  .n_head = c.n_head,
                                  .n_kv_head = c.n_kv_head,
                                  .d_head = c.d,
                                  .scale = scale};
  cuda::attention_paged(context(), c.t, layer(k, v), a);
  AttentionRun run;
  run.got = decode(c.t, out.get());
  if (!reference) return run;
  k_values = k.values(), v_values = v.values();
  for (size_t r = 0; r < rows.size(); r++) {
    for (int h = 0; h < c.n_head; h++) {
      const int kv_head = h / (c.n_head / c.n_kv_head);
      std::vector<double> p(static_cast<size_t>(n_key[r])), o(static_cast<size_t>(c.d));
      double top = -INFINITY, sum = 0;
      for (int32_t j = 0; j < n_key[r]; j++) {
        const float* key = &k_values[static_cast<size_t>(row_of(rows[r], j) * kv_width + kv_head * c.d)];
        double s = 0;
        for (int e = 0; e < c.d; e++)
          s += static_cast<double>(q[r * static_cast<size_t>(q_width) + static_cast<size_t>(h * c.d + e)]) *
               static_cast<double>(key[e]);
        p[static_cast<size_t>(j)] = s * static_cast<double>(scale);
        top = std::max(top, p[static_cast<size_t>(j)]);
      }
      for (auto& x : p) sum += x = std::exp(x - top);
      for (int32_t j = 0; j < n_key[r]; j++) {
        const float* value = &v_values[static_cast<size_t>(row_of(rows[r], j) * kv_width + kv_head * c.d)];
        for (int e = 0; e < c.d; e++)
          o[static_cast<size_t>(e)] += p[static_cast<size_t>(j)] / sum * static_cast<double>(value[e]);
      }
      run.want.insert(run.want.end(), o.begin(), o.end());
    }
  }
  return run;
}
std::vector<int32_t> all_rows(const AttentionCase& c) {
  std::vector<int32_t> rows(c.n_key.size());
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

void check_attention(const AttentionCase& c) {
  const auto what = std::string(dtype_name(c.t)) + " format " + std::to_string(static_cast<int>(c.format)) + " heads " +
                    std::to_string(c.n_head) + "/" + std::to_string(c.n_kv_head) + " d " + std::to_string(c.d) +
                    " shift " + std::to_string(c.shift) + " rows " + std::to_string(c.n_key.size()) + " keys " +
                    std::to_string(c.n_key[0]);
  const AttentionRun run = run_attention(c, all_rows(c), true);
  // Probabilities and the output are rounded to T; plain sums in fp32.
  expect_close(what, run.got, run.want, 2 * unit_of(c.t) + (c.format == KvFormat::i8 && c.t != f32 ? 8e-3 : 0), 0.5);
  EXPECT_EQ(run_attention(c, all_rows(c), false).got, run.got) << what << ": the bits differ from run to run";
}

TEST_F(CudaInfer, AttentionOverPages) {
  for (const DType t : types) {
    for (const KvFormat format : formats) {
      for (const int d : {32, 64, 96, 128}) {
        check_attention({t, format, 8, 4, d, 4, {37, 0, 1, 16, 17, 200, 15}});
        check_attention({t, format, 4, 4, d, 5, {300}});
      }
      check_attention({t, format, 8, 1, 64, 3, {65, 64, 63}});
      check_attention({t, format, 16, 1, 64, 0, {40, 5}});
      check_attention({t, format, 4, 1, 96, 10, {129, 1000}});
      check_attention({t, format, 6, 2, 96, 4, {129, 77}});
      check_attention({t, format, 8, 2, 64, 11, {2000}});
      check_attention({t, format, 8, 4, 96, 4, std::vector<int32_t>(70, 33)});
    }
  }
}

TEST_F(CudaInfer, AttentionReadsOldKeysEarly) {
  for (const DType t : {bf16, f16}) {
    for (const KvFormat format : {t == bf16 ? KvFormat::bf16 : KvFormat::f16, KvFormat::i8}) {
      for (const int32_t rows : {3, 70}) {
        for (const int32_t keys : {1, 15, 16, 17, 32, 33, 100, 129, 250, 300, 700}) {
          std::vector<int32_t> n_key;
          for (int32_t i = 0; i < rows; i++) n_key.push_back(std::max(i % 7 == 5 ? 0 : 1, keys - i % 3 * (keys / 4)));
          AttentionCase c = {t, format, 8, 4, 96, 4, n_key};
          c.n_new = 1;
          const AttentionRun early = run_attention(c, all_rows(c), true);
          expect_close("keys " + std::to_string(keys), early.got, early.want,
                       2 * unit_of(t) + (format == KvFormat::i8 ? 8e-3 : 0), 0.5);
          c.n_new = 1 << 30;
          EXPECT_EQ(run_attention(c, all_rows(c), false).got, early.got) << keys;
        }
      }
    }
  }
}

// One launch that norms, rotates, writes the last keys and attends, against two.
void check_attention_rope(int n_head, int n_kv_head, int d, bool norm, const std::vector<int32_t>& n_key) {
  const std::string what = "heads " + std::to_string(n_head) + "/" + std::to_string(n_kv_head) + " d " +
                           std::to_string(d) + " rows " + std::to_string(n_key.size()) + " keys " +
                           std::to_string(n_key[0]);
  const auto rows = static_cast<int64_t>(n_key.size());
  const int64_t longest = *std::max_element(n_key.begin(), n_key.end()), block = 16, table_ld = longest / block + 1,
                pool_rows = rows * table_ld * block;
  const auto width = static_cast<size_t>((n_head + 2 * n_kv_head) * d),
             q_size = static_cast<size_t>(rows) * static_cast<size_t>(n_head * d);
  std::vector<int32_t> seq, positions, slots, table;
  for (int64_t r = 0; r < rows; r++) {
    const int32_t keys = n_key[static_cast<size_t>(r)], last = keys - 1;
    seq.push_back(static_cast<int32_t>(r)), positions.push_back(std::max(last, 0));
    for (int64_t b = 0; b < table_ld; b++) table.push_back(static_cast<int32_t>((b * rows + (rows - 1 - r)) * block));
    const auto at = static_cast<size_t>(r * table_ld + last / block);
    slots.push_back(keys > 0 ? table[at] + static_cast<int32_t>(last % block) : -1);
  }
  const Device<unsigned char> qkv(encode(bf16, normal(static_cast<size_t>(rows) * width, 71, 1.5f))),
      q_weight(encode(bf16, normal(static_cast<size_t>(d), 72))),
      k_weight(encode(bf16, normal(static_cast<size_t>(d), 73))), q(Bytes(q_size * 2, 0x2a)),
      out(Bytes(q_size * 2, 0x2a)), fused(Bytes(q_size * 2, 0x2a));
  const auto table_size = static_cast<size_t>(longest * d / 2);
  const Device<float> cos(normal(table_size, 74)), sin(normal(table_size, 75));
  const Device<int32_t> seq_d(seq), n_key_d(n_key), positions_d(positions), slots_d(slots), table_d(table);
  const auto pool = [&](uint64_t seed) {
    Pool p(KvFormat::bf16, pool_rows, n_kv_head, d);
    p.fill(normal(static_cast<size_t>(pool_rows * n_kv_head * d), seed));
    return p.data.get();
  };
  const Bytes k_bytes = pool(76), v_bytes = pool(77);
  const Device<unsigned char> k(k_bytes), v(v_bytes), k2(k_bytes), v2(v_bytes);
  const cuda::NormRope rope = {.q_weight = norm ? q_weight.pointer() : nullptr,
                               .k_weight = norm ? k_weight.pointer() : nullptr,
                               .cos = cos,
                               .sin = sin,
                               .positions = positions_d,
                               .n = rows,
                               .n_head = n_head,
                               .n_kv_head = n_kv_head,
                               .d_head = d};
  cuda::PagedAttention a = {.q = q,
                            .out = out,
                            .ldq = n_head * d,
                            .ldo = n_head * d,
                            .seq = seq_d,
                            .n_key = n_key_d,
                            .table = table_d,
                            .table_ld = table_ld,
                            .block_shift = 4,
                            .n_row = rows,
                            .max_key = longest,
                            .n_new = 1,
                            .n_head = n_head,
                            .n_kv_head = n_kv_head,
                            .d_head = d,
                            .scale = 0.1f};
  const cuda::KvLayer one = {KvFormat::bf16, k, v, nullptr, nullptr}, two = {KvFormat::bf16, k2, v2, nullptr, nullptr};
  cuda::paged_norm_rope(context(), bf16, q, one, nullptr, nullptr, slots_d, qkv, rope);
  cuda::attention_paged(context(), bf16, one, a);
  a.q = nullptr, a.ldq = 0, a.out = fused, a.qkv = qkv, a.rope = rope;
  ASSERT_TRUE(cuda::attention_paged_ropes(context(), bf16, two, a)) << what;
  cuda::attention_paged(context(), bf16, two, a);
  const auto close = [&](const char* which, const Device<unsigned char>& x, const Device<unsigned char>& y,
                         double tolerance) {
    const std::vector<float> want = decode(bf16, y.get());
    expect_close(what + which, decode(bf16, x.get()), std::vector<double>(want.begin(), want.end()), tolerance, 0.5);
  };
  close(" keys", k2, k, 2 * unit_of(bf16));
  close(" values", v2, v, 0);
  close(" out", fused, out, 8 * unit_of(bf16));
}

TEST_F(CudaInfer, AttentionWithRope) {
  if (context().arch < 90) GTEST_SKIP() << "NOT TESTED: no Hopper";
  for (const bool norm : {true, false}) {
    for (const int32_t keys : {1, 2, 16, 17, 33, 100, 129, 250, 600}) {
      std::vector<int32_t> many;
      for (int32_t i = 0; i < 70; i++) many.push_back(i % 9 == 4 ? 0 : std::max(1, keys - i % 4 * (keys / 5)));
      check_attention_rope(8, 4, 96, norm, many);
      check_attention_rope(8, 4, 96, norm, {keys, 0, 5});
      check_attention_rope(8, 2, 64, norm, {keys, 3});
      check_attention_rope(4, 4, 128, norm, {keys, 40});
      check_attention_rope(6, 1, 96, norm, {keys});
    }
  }
}

TEST_F(CudaInfer, AttentionRowsDoNotDependOnTheBatch) {
  for (const KvFormat format : {KvFormat::bf16, KvFormat::i8}) {
    std::vector<int32_t> n_key;
    for (int i = 0; i < 64; i++)
      n_key.push_back(static_cast<int32_t>(1 + philox4x32(5, 1, static_cast<uint64_t>(i))[0] % 400));
    n_key[3] = 0;
    const AttentionCase c = {bf16, format, 8, 4, 96, 4, n_key, true};
    const std::vector<float> batch = run_attention(c, all_rows(c), false).got;
    for (const int32_t r : {0, 3, 17, 63}) {
      const std::vector<float> alone = run_attention(c, {r}, false).got;
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), batch.begin() + r * 8 * 96)) << "row " << r;
    }
  }
}

TEST_F(CudaInfer, AttentionKeepsNan) {
  for (const DType t : types) {
    for (const KvFormat format : formats) {
      const AttentionCase c = {t, format, 8, 4, 96, 4, {37, 20, 50}, false, 1};
      const std::vector<float> got = run_attention(c, all_rows(c), false).got;
      for (size_t i = 0; i < got.size(); i++) {
        const bool nan = i / (8 * 96) == 1;
        ASSERT_EQ(std::isnan(got[i]), nan) << dtype_name(t) << " format " << static_cast<int>(format) << " at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace mm
#endif
