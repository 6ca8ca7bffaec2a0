// The CUDA kernels of inference (cuda/infer_kernels.h but the persistent step) against plain references in double.
#ifdef MM_CUDA
#include "kernels/cuda/infer_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "base/rng.h"
#include "kernels/cuda/session.h"
#include "tensor/memory.h"

namespace mm {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr DType types[] = {f32, bf16, f16};
constexpr KvFormat formats[] = {KvFormat::f32, KvFormat::bf16, KvFormat::f16, KvFormat::i8};

const cuda::Context& context() {
  static cuda::Session session;
  return session.ctx;
}

// An array on the GPU. Copies wait.
template <class T>
class Device {
 public:
  explicit Device(const std::vector<T>& host) : n_(host.size()) {
    p_ = static_cast<T*>(allocate(std::max<size_t>(bytes(), 16), Memory::cuda));
    synchronize(nullptr);
    set(host);
  }
  ~Device() { release(p_, std::max<size_t>(bytes(), 16), Memory::cuda); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* pointer() const { return p_; }
  operator T*() const { return p_; }  // NOLINT(google-explicit-constructor)
  void set(const std::vector<T>& host) {
    if (n_ > 0) copy_async(p_, host.data(), bytes(), context().stream);
    synchronize(context().stream);
  }
  std::vector<T> get() const {
    std::vector<T> host(n_);
    if (n_ > 0) copy_async(host.data(), p_, bytes(), context().stream);
    synchronize(context().stream);
    return host;
  }

 private:
  size_t bytes() const { return n_ * sizeof(T); }
  size_t n_;
  T* p_;
};
using Bytes = std::vector<unsigned char>;

// Floats as elements of type t, and back.
Bytes encode(DType t, const std::vector<float>& x) {
  Bytes out(x.size() * dtype_size(t));
  for (size_t i = 0; i < x.size(); i++) {
    const uint16_t h = t == bf16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
    if (t == f32) std::memcpy(&out[4 * i], &x[i], 4);
    else std::memcpy(&out[2 * i], &h, 2);
  }
  return out;
}
std::vector<float> decode(DType t, const Bytes& b) {
  std::vector<float> x(b.size() / dtype_size(t));
  for (size_t i = 0; i < x.size(); i++) {
    uint16_t h = 0;
    if (t == f32) std::memcpy(&x[i], &b[4 * i], 4);
    else std::memcpy(&h, &b[2 * i], 2), x[i] = t == bf16 ? bf16_to_float(h) : f16_to_float(h);
  }
  return x;
}
std::vector<float> rounded(DType t, const std::vector<float>& x) { return decode(t, encode(t, x)); }
std::vector<float> normal(size_t n, uint64_t stream, float scale = 1.0f) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; i++) x[i] = scale * philox_normal(7, stream, i);
  return x;
}
double unit_of(DType t) { return t == f32 ? 3e-7 : t == bf16 ? 4e-3 : 5e-4; }  // largest error of one rounding

// |got - want| <= tolerance * (|want| + scale), and NaN exactly where NaN is wanted.
void expect_close(const std::string& what, const std::vector<float>& got, const std::vector<double>& want,
                  double tolerance, double scale) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); i++) {
    const auto g = static_cast<double>(got[i]);
    double error = std::abs(g - want[i]) / (std::abs(want[i]) + scale);
    if (std::isnan(g) != std::isnan(want[i])) error = 1e30;
    else if (std::isnan(g)) error = 0;
    if (!(error <= worst)) worst = error, at = i;
  }
  EXPECT_LE(worst, tolerance) << what << ": worst at " << at << ": got " << got[at] << ", want " << want[at];
}

class CudaInfer : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  }
};

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
          u[static_cast<size_t>(j)] *= static_cast<double>((h < c.n_head ? qw : kw)[static_cast<size_t>(j)]) /
                                       std::sqrt(sum / c.d + 1e-6);
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
  const double unit = unit_of(c.t), kv_unit = c.format == KvFormat::i8 ? 0.02 : unit_of(element(c.format));
  expect_close(what + " q", decode(c.t, q_out.get()), want_q, 1.5 * unit, 1);
  expect_close(what + " k", k.values(), want_k, 1.5 * kv_unit, 1);
  expect_close(what + " v", v.values(), want_v, 1.5 * kv_unit, 1);
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
      const std::vector<int32_t> from = {3, 50, 0}, to = {20, 8, 63}, count = {7, 12, 0};
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
  expect_close(what, run.got, run.want, 2 * unit_of(c.t) + (c.format == KvFormat::i8 && c.t != f32 ? 4e-3 : 0), 0.5);
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
      check_attention({t, format, 8, 2, 64, 20, {2000}});
      check_attention({t, format, 8, 4, 96, 4, std::vector<int32_t>(70, 33)});
    }
  }
}

TEST_F(CudaInfer, AttentionRowsDoNotDependOnTheBatch) {
  for (const KvFormat format : {KvFormat::bf16, KvFormat::i8}) {
    std::vector<int32_t> n_key;
    for (int i = 0; i < 64; i++) n_key.push_back(static_cast<int32_t>(1 + philox4x32(5, 1, static_cast<uint64_t>(i))[0] % 400));
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

// --- int8 weights -------------------------------------------------------------------------------------------------
struct Quantized {
  std::vector<int8_t> data;
  std::vector<uint16_t> scales;
  std::vector<double> values;
};
Quantized quantize(const std::vector<float>& w) {
  Quantized q;
  for (size_t at = 0; at < w.size(); at += 32) {
    float top = 0;
    for (size_t i = 0; i < 32; i++) top = std::max(top, std::abs(w[at + i]));
    q.scales.push_back(float_to_f16(top / 127.0f));
    const float scale = f16_to_float(q.scales.back());
    for (size_t i = 0; i < 32; i++) {
      q.data.push_back(static_cast<int8_t>(scale > 0 ? std::clamp(std::nearbyint(w[at + i] / scale), -127.0f, 127.0f) : 0));
      q.values.push_back(static_cast<double>(q.data.back()) * static_cast<double>(scale));
    }
  }
  return q;
}

TEST_F(CudaInfer, I8Quantize) {
  constexpr int64_t n = 7, k = 96;
  std::vector<float> w = normal(n * k, 41, 0.05f);
  std::fill(w.begin() + 32, w.begin() + 64, 0.0f);
  w[64] = kNan;
  const Device<float> w_d(w);
  const Device<int8_t> data(std::vector<int8_t>(n * k, 3));
  const Device<uint16_t> scales(std::vector<uint16_t>(n * k / 32));
  cuda::quantize_i8(context(), data, scales, w_d, n, k);
  const std::vector<uint16_t> got_scales = scales.get();
  EXPECT_TRUE(std::isnan(f16_to_float(got_scales[2])));
  w[64] = 0;
  const Quantized want = quantize(w);
  const std::vector<int8_t> got = data.get();
  for (size_t i = 0; i < got.size(); i++) {
    if (i / 32 == 2) continue;
    ASSERT_EQ(got_scales[i / 32], want.scales[i / 32]) << i;
    ASSERT_EQ(got[i], want.data[i]) << i;
  }
}

void check_linear(DType t, int64_t m, int64_t n, int64_t k, bool residual) {
  const std::string what = std::string(dtype_name(t)) + " m " + std::to_string(m) + " n " + std::to_string(n) + " k " +
                           std::to_string(k) + (residual ? " +" : "");
  const Quantized q = quantize(normal(static_cast<size_t>(n * k), 42, 0.05f));
  std::vector<float> x = rounded(t, normal(static_cast<size_t>(m * k), 43));
  const int64_t nan_row = m > 2 ? 1 : -1;
  if (nan_row >= 0) x[static_cast<size_t>(nan_row * k + 5)] = kNan;
  const std::vector<float> y = rounded(t, normal(static_cast<size_t>(m * n), 44));
  std::vector<double> want(y.begin(), y.end()), want_rows;
  std::vector<float> got_rows;
  const Device<unsigned char> x_d(encode(t, x)), y_d(encode(t, y));
  const Device<int8_t> data(q.data);
  const Device<uint16_t> scales(q.scales);
  const void* add = residual ? y_d.pointer() : nullptr;
  cuda::linear_i8(context(), t, y_d, x_d, data, scales, add, m, n, k);
  const std::vector<float> got = decode(t, y_d.get());
  for (int64_t r = 0; r < m; r++) {  // all rows of small products, some of large ones
    if (m * n * k > 20'000'000 && r != 1 && r != m - 1 && r % 61 != 0) continue;
    for (int64_t c = 0; c < n; c++) {
      double s = residual ? static_cast<double>(y[static_cast<size_t>(r * n + c)]) : 0;
      for (int64_t i = 0; i < k; i++)
        s += static_cast<double>(x[static_cast<size_t>(r * k + i)]) * q.values[static_cast<size_t>(c * k + i)];
      want_rows.push_back(s), got_rows.push_back(got[static_cast<size_t>(r * n + c)]);
    }
  }
  expect_close(what, got_rows, want_rows, 1.1 * unit_of(t), t == f32 ? 2 : 0.02);
  if (residual) return;
  cuda::linear_i8(context(), t, y_d, x_d, data, scales, nullptr, m, n, k);
  EXPECT_EQ(y_d.get(), encode(t, got)) << what << ": the bits differ from run to run";
}

TEST_F(CudaInfer, I8Linear) {
  for (const DType t : types) {
    for (const int64_t m : {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 96, 97, 128, 129, 300}) {
      check_linear(t, m, 50, 96, m % 2 == 0);
      check_linear(t, m, 16, 32, m % 2 == 1);
    }
    for (const int64_t m : {1, 12, 30, 60, 96, 128, 200}) check_linear(t, m, 4100, 288, false);
    check_linear(t, 96, 768, 2432, true);
    check_linear(t, 1, 6400, 768, false);
  }
}

// --- sampling -----------------------------------------------------------------------------------------------------
struct SampleRow {
  std::vector<float> logits;
  RowSampling p;
  std::vector<LogitEdit> edits;
  std::vector<uint32_t> mask;  // empty: all
};

struct Expected {
  int32_t id = -1;
  bool close = false;  // a threshold or the draw lies so near a border that a rounding may decide
};

// The sampler in double.
Expected reference_draw(const SampleRow& r) {
  constexpr double near = 1e-5;
  const size_t n = r.logits.size();
  std::vector<double> x(r.logits.begin(), r.logits.end());
  for (const LogitEdit& e : r.edits) {
    if (e.id < 0 || e.id >= static_cast<int32_t>(n)) continue;
    double& y = x[static_cast<size_t>(e.id)];
    if (e.seen) y = y > 0 ? y / static_cast<double>(r.p.repetition) : y * static_cast<double>(r.p.repetition);
    if (e.count > 0) y -= static_cast<double>(r.p.presence) + static_cast<double>(r.p.frequency) * e.count;
    y += static_cast<double>(e.bias);
  }
  for (size_t i = 0; i < n; i++) {
    if (!(r.logits[i] < kInf)) return {};
    if (!r.mask.empty() && (r.mask[i / 32] >> (i % 32) & 1) == 0) x[i] = -INFINITY;
  }
  const double max = *std::max_element(x.begin(), x.end());
  if (!(max < INFINITY) || max == -INFINITY) return {};
  if (r.p.temperature < 1e-3f) return {static_cast<int32_t>(std::find(x.begin(), x.end(), max) - x.begin()), false};
  struct Token {
    double score, prob;
    int32_t id;
  };
  std::vector<Token> pool;
  for (size_t i = 0; i < n; i++) {
    if (x[i] == -INFINITY) continue;
    const double d = (x[i] - max) / static_cast<double>(r.p.temperature);
    pool.push_back({d, std::exp(d), static_cast<int32_t>(i)});
  }
  std::sort(pool.begin(), pool.end(), [](const Token& a, const Token& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
  });
  Expected want;
  if (const auto k = static_cast<size_t>(r.p.top_k); k > 0 && k < pool.size()) {
    size_t end = k;
    while (end < pool.size() && pool[end].score == pool[k - 1].score) end++;
    want.close = end < pool.size() && pool[k - 1].score - pool[end].score < 1e-5 && pool[end].prob > near;
    pool.resize(end);
  }
  double total = 0, cumulated = 0;
  for (const Token& t : pool) total += t.prob;
  if (r.p.top_p < 1.0f) {
    const double limit = static_cast<double>(r.p.top_p) * total;
    size_t kept = 0;
    while (kept < pool.size() && (kept == 0 || cumulated <= limit)) {
      cumulated += pool[kept++].prob;
      want.close = want.close || std::abs(cumulated - limit) < near * total;
    }
    pool.resize(kept);
    // The order of nearly equal probabilities is a matter of rounding as well.
    for (size_t i = 1; i < pool.size(); i++)
      want.close = want.close || (pool[i - 1].score != pool[i].score && pool[i - 1].score - pool[i].score < 1e-6);
  }
  std::erase_if(pool, [&](const Token& t) {
    want.close = want.close || std::abs(t.prob - static_cast<double>(r.p.min_p)) < 1e-7;
    return t.prob < static_cast<double>(r.p.min_p);
  });
  if (!(r.p.top_p < 1.0f)) std::sort(pool.begin(), pool.end(), [](auto& a, auto& b) { return a.id < b.id; });
  total = 0, cumulated = 0;
  for (const Token& t : pool) total += t.prob;
  const auto bits = philox4x32(r.p.seed, r.p.stream, r.p.index);
  const double u = static_cast<double>((uint64_t{bits[0]} << 32 | bits[1]) >> 11) * 0x1p-53;
  for (const Token& t : pool) {
    cumulated += t.prob;
    want.close = want.close || std::abs(u - cumulated / total) < near;
    if (want.id < 0 && u < cumulated / total) want.id = t.id;
  }
  if (want.id < 0) want.id = pool.back().id;
  return want;
}

std::vector<int32_t> draw(DType t, const std::vector<SampleRow>& rows, int64_t ld) {
  const auto n_vocab = static_cast<int64_t>(rows[0].logits.size());
  const auto words = static_cast<size_t>((n_vocab + 31) / 32);
  std::vector<float> logits(rows.size() * static_cast<size_t>(ld), kNan);
  std::vector<RowSampling> params;
  std::vector<LogitEdit> edits;
  std::vector<uint32_t> masks;
  for (size_t i = 0; i < rows.size(); i++) {
    std::copy(rows[i].logits.begin(), rows[i].logits.end(), logits.begin() + static_cast<int64_t>(i) * ld);
    RowSampling p = rows[i].p;
    p.edits_begin = static_cast<int32_t>(edits.size());
    edits.insert(edits.end(), rows[i].edits.begin(), rows[i].edits.end());
    p.edits_end = static_cast<int32_t>(edits.size());
    p.mask = rows[i].mask.empty() ? -1 : static_cast<int32_t>(masks.size() / words);
    masks.insert(masks.end(), rows[i].mask.begin(), rows[i].mask.end());
    params.push_back(p);
  }
  const Device<unsigned char> logits_d(encode(t, logits));
  const Device<RowSampling> params_d(params);
  const Device<LogitEdit> edits_d(edits);
  const Device<uint32_t> masks_d(masks);
  const auto n = static_cast<int64_t>(rows.size());
  const Device<int32_t> ids(std::vector<int32_t>(rows.size(), -7));
  auto* ids_host = static_cast<int32_t*>(allocate(rows.size() * 4, Memory::pinned));
  cuda::sample_rows(context(), t, ids, ids_host, logits_d, ld, n_vocab, params_d, edits_d, masks_d, n);
  std::vector<int32_t> got = ids.get();
  EXPECT_TRUE(std::equal(got.begin(), got.end(), ids_host));
  release(ids_host, rows.size() * 4, Memory::pinned);
  return got;
}

void check_draws(const std::string& what, DType t, std::vector<SampleRow> rows, int64_t ld = 0) {
  const auto n_vocab = static_cast<int64_t>(rows[0].logits.size());
  for (auto& r : rows) r.logits = rounded(t, r.logits);
  const std::vector<int32_t> got = draw(t, rows, ld == 0 ? n_vocab : ld);
  EXPECT_EQ(draw(t, rows, ld == 0 ? n_vocab : ld), got) << what << ": not the same tokens again";
  size_t differ = 0, close = 0;
  for (size_t i = 0; i < rows.size(); i++) {
    const Expected want = reference_draw(rows[i]);
    close += want.close ? 1 : 0;
    if (got[i] == want.id || want.close) continue;
    const RowSampling& p = rows[i].p;
    if (differ++ < 3)
      ADD_FAILURE() << what << " " << dtype_name(t) << " row " << i << ": got " << got[i] << ", want " << want.id
                    << " (temperature " << p.temperature << " top_k " << p.top_k << " top_p " << p.top_p << " min_p "
                    << p.min_p << " edits " << rows[i].edits.size() << ")";
  }
  EXPECT_EQ(differ, 0u) << what << " of " << rows.size();
  EXPECT_LE(close, rows.size() / 10 + 1) << what << ": too many rows are left out for the test to mean something";
}

SampleRow make_row(size_t n_vocab, uint64_t i, float scale) {
  SampleRow r;
  r.logits = normal(n_vocab, 100 + i, scale);
  r.p.seed = 5, r.p.stream = i, r.p.index = 17 * i;
  return r;
}

TEST_F(CudaInfer, DrawsAsTheReference) {
  for (const DType t : types) {
    for (const size_t n_vocab : {6400u, 1000u, 151u, 7u, 20001u}) {
      std::vector<SampleRow> rows;
      for (uint64_t i = 0; i < 48; i++) {
        const auto pick = [&](std::initializer_list<float> from, uint32_t k) {
          return from.begin()[philox4x32(9, i, k)[0] % from.size()];
        };
        SampleRow r = make_row(n_vocab, i, pick({0.3f, 3.0f, 8.0f}, 0));
        r.p.temperature = pick({0.0f, 0.2f, 0.85f, 1.0f, 2.5f}, 1);
        r.p.top_k = static_cast<int32_t>(pick({0, 0, 1, 50, 50, 900, 3000}, 2));
        r.p.top_p = pick({0.1f, 0.85f, 0.999f, 1.0f, 1.0f}, 3);
        r.p.min_p = pick({0, 0, 0, 0.05f, 0.9f}, 4);
        if (i % 3 == 1) {
          r.p.repetition = pick({1.0f, 1.3f, 0.8f}, 5), r.p.presence = pick({0, 0.5f}, 6);
          r.p.frequency = pick({0, 0.25f}, 7);
          for (int32_t id = 0; id < static_cast<int32_t>(n_vocab); id += 3)
            r.edits.push_back({id, id % 2, id % 5, id % 7 == 0 ? 2.5f : 0.0f});
          r.edits.push_back({static_cast<int32_t>(n_vocab), 1, 1, 100}), r.edits.push_back({-1, 1, 1, 100});
        }
        if (i % 4 == 2) {
          r.mask.resize((n_vocab + 31) / 32);
          for (size_t j = 0; j < r.mask.size(); j++) r.mask[j] = philox4x32(13, i, j)[0];
          r.mask[0] |= 1;
        }
        rows.push_back(r);
      }
      check_draws("mixed " + std::to_string(n_vocab), t, rows, n_vocab == 151 ? 160 : 0);
    }
  }
}

// More candidates than can be sorted: thresholds by selection on bits.
TEST_F(CudaInfer, DrawsFromFlatAndTiedLogits) {
  std::vector<SampleRow> rows;
  for (uint64_t i = 0; i < 40; i++) {
    SampleRow r = make_row(6400, i, i % 2 == 0 ? 0.5f : 0.02f);
    if (i % 5 == 3) std::fill(r.logits.begin(), r.logits.end(), 1.5f);
    if (i % 5 == 4) {
      for (auto& x : r.logits) x = std::round(x * 4) / 4;
    }
    r.p.top_k = i % 4 == 3 ? 0 : 500 + 700 * static_cast<int32_t>(i % 4);
    r.p.top_p = i % 3 == 0 ? 1.0f : 0.77f;
    r.p.min_p = i % 7 == 1 ? 0.3f : 0.0f;
    rows.push_back(r);
  }
  for (const DType t : types) check_draws("flat", t, rows);
}

TEST_F(CudaInfer, DrawsFromALargeVocabulary) {
  std::vector<SampleRow> rows;
  for (uint64_t i = 0; i < 60; i++) {  // more than the scratch memory holds at once
    SampleRow r = make_row(151936, i % 4, i % 2 == 0 ? 4.0f : 0.5f);
    r.p.index = i, r.p.top_k = i % 3 == 0 ? 0 : 50, r.p.top_p = i % 2 == 0 ? 0.9f : 1.0f;
    rows.push_back(r);
  }
  check_draws("large", bf16, rows);
}

TEST_F(CudaInfer, DrawsNothingFromBrokenRows) {
  for (const DType t : types) {
    for (const float temperature : {0.0f, 0.8f}) {
      std::vector<SampleRow> rows(6, make_row(6400, 1, 3));
      for (auto& r : rows) r.p.temperature = temperature, r.p.top_k = 50, r.p.top_p = 0.85f;
      rows[1].logits[6399] = kNan;
      rows[2].logits[7] = kInf;
      std::fill(rows[3].logits.begin(), rows[3].logits.end(), -kInf);
      rows[4].mask.assign(200, 0);
      rows[5].mask.assign(200, 0), rows[5].mask[3] = 1u << 5;
      const std::vector<int32_t> got = draw(t, rows, 6400);
      EXPECT_GE(got[0], 0);
      for (size_t i = 1; i < 5; i++) EXPECT_EQ(got[i], -1) << i;
      EXPECT_EQ(got[5], 3 * 32 + 5);
    }
  }
}

TEST_F(CudaInfer, GreedyTakesTheLowestIdOnATie) {
  SampleRow r = make_row(6400, 1, 1);
  r.p.temperature = 0;
  r.logits[4000] = r.logits[123] = r.logits[6399] = 20;
  EXPECT_EQ(draw(bf16, {r}, 6400), std::vector<int32_t>{123});
}

TEST_F(CudaInfer, DrawsDoNotDependOnTheBatch) {
  std::vector<SampleRow> rows;
  for (uint64_t i = 0; i < 200; i++) {
    rows.push_back(make_row(6400, i, 3));
    rows.back().p.top_k = 50, rows.back().p.top_p = 0.85f;
  }
  const std::vector<int32_t> all = draw(bf16, rows, 6400);
  for (const size_t i : {0u, 77u, 199u}) EXPECT_EQ(draw(bf16, {rows[i]}, 6400)[0], all[i]);
}

TEST_F(CudaInfer, RowLogprobs) {
  for (const DType t : types) {
    constexpr int64_t n = 3, v = 1003, ld = 1010;
    constexpr int n_top = 20;
    std::vector<float> x = rounded(t, normal(n * ld, 31, 3));
    x[5] = x[900] = x[77] = 15;  // a tie
    const std::vector<int32_t> ids = {900, 0, 1002};
    const Device<unsigned char> x_d(encode(t, x));
    const std::vector<float> none(n * n_top);
    const Device<float> logprob(std::vector<float>(none.begin(), none.begin() + n)), top_logprob(none);
    const Device<int32_t> ids_d(ids), top_ids(std::vector<int32_t>(n * n_top));
    cuda::row_logprobs(context(), t, logprob, top_ids, top_logprob, x_d, ld, v, ids_d, n_top, n);
    std::vector<double> want, want_top;
    std::vector<int32_t> want_ids;
    for (int64_t r = 0; r < n; r++) {
      const float* row = &x[static_cast<size_t>(r * ld)];
      double sum = 0;
      for (int64_t i = 0; i < v; i++) sum += std::exp(static_cast<double>(row[i]));
      std::vector<int32_t> order(v);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
      want.push_back(static_cast<double>(row[ids[static_cast<size_t>(r)]]) - std::log(sum));
      for (int k = 0; k < n_top; k++) {
        want_ids.push_back(order[static_cast<size_t>(k)]);
        want_top.push_back(static_cast<double>(row[order[static_cast<size_t>(k)]]) - std::log(sum));
      }
    }
    expect_close("logprob", logprob.get(), want, 1e-5, 0.1);
    expect_close("top logprob", top_logprob.get(), want_top, 1e-5, 0.1);
    EXPECT_EQ(top_ids.get(), want_ids);
  }
}

TEST_F(CudaInfer, ResolveIds) {
  const Device<int32_t> ids(std::vector<int32_t>{5, -1, 0, -3, -2}), source(std::vector<int32_t>{70, 80, 90});
  cuda::resolve_ids(context(), ids, source, 5);
  EXPECT_EQ(ids.get(), (std::vector<int32_t>{5, 70, 0, 90, 80}));
}

}  // namespace
}  // namespace mm
#endif
