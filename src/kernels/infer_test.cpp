// The CPU inference step against a plain double-precision model, for every instruction set of the machine.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "base/thread_team.h"
#include "kernels/cpu/infer.h"
#include "kernels/cpu/infer_plan.h"

namespace mm {

namespace {

struct Shape {
  const char* name;
  int64_t d, ff, layers, vocab;
  int n_head, n_kv, dh, n_expert = 0, top_k = 0, n_shared = 0;
  bool qk_norm = true, norm_topk = true;
};
const Shape shapes[] = {
    {"qwen3", 64, 96, 2, 80, 4, 2, 32},         {"llama", 48, 64, 2, 50, 4, 1, 16, 0, 0, 0, false},
    {"odd", 42, 50, 1, 37, 3, 1, 14},           {"heads96", 96, 160, 1, 96, 2, 2, 96},
    {"top1", 64, 64, 2, 48, 2, 1, 32, 4, 1, 1}, {"top2", 40, 36, 2, 48, 2, 2, 20, 3, 2, 0, true, false}};

std::vector<float> random_values(int64_t n, uint32_t seed, float scale, float mean = 0) {
  std::mt19937 gen(seed);
  std::normal_distribution<float> dist(mean, scale);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = dist(gen);
  return v;
}

// 64-byte aligned memory of exactly n bytes, followed by bytes that must not change.
class Guarded {
 public:
  explicit Guarded(size_t n) : n_(n), bytes_(n + 64 + guard, 0xa5) {}
  char* data() {
    const auto at = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<char*>(bytes_.data()) + (64 - at % 64) % 64;
  }
  bool intact() {
    for (size_t i = 0; i < guard; i++) {
      if (static_cast<unsigned char>(data()[n_ + i]) != 0xa5) return false;
    }
    return true;
  }

 private:
  static constexpr size_t guard = 256;
  size_t n_;
  std::vector<unsigned char> bytes_;
};

constexpr int64_t max_pos = 300;

// A random model: packed for infer_step, and the values that the packed matrices stand for, in row-major order.
class TestModel {
 public:
  TestModel(const Shape& of, WeightFormat format) : shape(of) {
    const int64_t width = (shape.n_head + 2 * shape.n_kv) * shape.dh;
    embed_ = random_values(shape.vocab * shape.d, seed_++, 1.0f);
    const auto half = static_cast<size_t>(shape.dh / 2);
    for (int64_t p = 0; p < max_pos; p++) {
      for (size_t i = 0; i < half; i++) {
        const double angle = static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(i) / shape.dh * 2);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    layers_.resize(static_cast<size_t>(shape.layers));
    experts_.resize(4 * layers_.size());
    for (size_t l = 0; l < layers_.size(); l++) {
      InferLayer& w = layers_[l];
      w.input_norm = norm(shape.d), w.post_norm = norm(shape.d);
      if (shape.qk_norm) w.q_norm = norm(shape.dh), w.k_norm = norm(shape.dh);
      w.qkv = matrix(width, shape.d, format);
      w.o = matrix(shape.d, shape.n_head * shape.dh, format);
      if (shape.n_expert == 0) {
        w.gate_up = matrix(2 * shape.ff, shape.d, format);
        w.down = matrix(shape.d, shape.ff, format);
        continue;
      }
      w.router = matrix(shape.n_expert, shape.d, WeightFormat::f32);
      for (int e = 0; e < shape.n_expert + shape.n_shared; e++) {
        experts_[4 * l + (e < shape.n_expert ? 0 : 2)].push_back(matrix(2 * shape.ff, shape.d, format));
        experts_[4 * l + (e < shape.n_expert ? 1 : 3)].push_back(matrix(shape.d, shape.ff, format));
      }
      w.expert_gate_up = experts_[4 * l].data(), w.expert_down = experts_[4 * l + 1].data();
      w.shared_gate_up = experts_[4 * l + 2].data(), w.shared_down = experts_[4 * l + 3].data();
    }
    view = {.d_model = shape.d,
            .d_ff = shape.ff,
            .n_layer = shape.layers,
            .n_vocab = shape.vocab,
            .n_head = shape.n_head,
            .n_kv_head = shape.n_kv,
            .d_head = shape.dh,
            .n_expert = shape.n_expert,
            .n_expert_per_tok = shape.top_k,
            .n_shared = shape.n_shared,
            .norm_topk = shape.norm_topk,
            .attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.dh)),
            .cos = cos_.data(),
            .sin = sin_.data(),
            .layers = layers_.data(),
            .embed = {WeightFormat::f32, embed_.data(), nullptr, shape.vocab, shape.d},
            .final_norm = norm(shape.d),
            .head = matrix(shape.vocab, shape.d, format)};
  }
  float* embed_row(int64_t id) { return embed_.data() + id * shape.d; }

  // Logits of the last `n_out` tokens of one sequence, computed plainly. Keys and values are rounded as the cache does.
  std::vector<double> logits(const std::vector<int32_t>& ids, size_t n_out, KvFormat kv) const;

  const Shape shape;
  InferModel view;

 private:
  const float* norm(int64_t n) {
    rows_.push_back(random_values(n, seed_++, 0.2f, 1.0f));
    return rows_.back().data();
  }
  InferMatrix matrix(int64_t n, int64_t k, WeightFormat format) {
    const std::vector<float> w = random_values(n * k, seed_++, 1.0f / std::sqrt(static_cast<float>(k)));
    packed_.emplace_back(cpu::packed_bytes(format, n, k));
    cpu::pack_matrix(format, packed_.back().data(), w.data(), n, k);
    EXPECT_TRUE(packed_.back().intact());
    return {format, packed_.back().data(), nullptr, n, k};
  }
  using Vector = std::vector<double>;
  static Vector times(const InferMatrix& w, const Vector& x) {
    std::vector<float> rows(static_cast<size_t>(w.n * w.k));
    cpu::unpack_rows(w, 0, w.n, rows.data());
    Vector y(static_cast<size_t>(w.n));
    for (size_t i = 0; i < y.size(); i++)
      for (size_t j = 0; j < x.size(); j++) y[i] += rows[i * x.size() + j] * x[j];
    return y;
  }
  Vector normed(const double* x, const float* w, size_t n) const {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += x[i] * x[i];
    Vector y(n);
    for (size_t i = 0; i < n; i++) y[i] = x[i] / std::sqrt(s / static_cast<double>(n) + view.eps) * w[i];
    return y;
  }
  Vector rotated(const double* x, const float* w, size_t pos) const {
    const auto dh = static_cast<size_t>(shape.dh), half = dh / 2;
    const Vector a = w != nullptr ? normed(x, w, dh) : Vector(x, x + dh);
    Vector y(dh);
    for (size_t i = 0; i < half; i++) {
      const double c = cos_[pos * half + i], s = sin_[pos * half + i];
      y[i] = a[i] * c - a[i + half] * s;
      y[i + half] = a[i + half] * c + a[i] * s;
    }
    return y;
  }
  Vector ffn(const InferMatrix& gate_up, const InferMatrix& down, const Vector& h) const {
    const Vector g = times(gate_up, h);
    Vector act(g.size() / 2);
    for (size_t i = 0; i < act.size(); i++) act[i] = g[i] / (1 + std::exp(-g[i])) * g[act.size() + i];
    return times(down, act);
  }
  Vector ffn_of_layer(const InferLayer& w, const Vector& h) const;

  uint32_t seed_ = 1;
  std::vector<float> embed_, cos_, sin_;
  std::vector<std::vector<float>> rows_;
  std::vector<Guarded> packed_;
  std::vector<InferLayer> layers_;
  std::vector<std::vector<InferMatrix>> experts_;
};

double round_kv(KvFormat format, double x, double absmax) {
  switch (format) {
    case KvFormat::f32: return static_cast<float>(x);
    case KvFormat::bf16:
      return std::bit_cast<float>((std::bit_cast<uint32_t>(static_cast<float>(x)) + 0x8000u) & ~0xffffu);
    case KvFormat::f16: return std::ldexp(std::nearbyint(std::ldexp(x, 10 - std::ilogb(x))), std::ilogb(x) - 10);
    case KvFormat::i8: return std::nearbyint(x / absmax * 127) * absmax / 127;
  }
  return x;
}

std::vector<double> TestModel::ffn_of_layer(const InferLayer& w, const Vector& h) const {
  if (shape.n_expert == 0) return ffn(w.gate_up, w.down, h);
  Vector p = times(w.router, h);
  double sum = 0, chosen_sum = 0;
  for (double& x : p) sum += x = std::exp(x);
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return p[static_cast<size_t>(a)] > p[static_cast<size_t>(b)]; });
  for (int j = 0; j < shape.top_k; j++) chosen_sum += p[static_cast<size_t>(order[static_cast<size_t>(j)])];
  Vector out(h.size());
  const auto add = [&](double weight, const Vector& y) {
    for (size_t i = 0; i < y.size(); i++) out[i] += weight * y[i];
  };
  for (int j = 0; j < shape.top_k; j++) {
    const auto e = static_cast<size_t>(order[static_cast<size_t>(j)]);
    add(p[e] / (shape.norm_topk ? chosen_sum : sum), ffn(w.expert_gate_up[e], w.expert_down[e], h));
  }
  for (int e = 0; e < shape.n_shared; e++) add(1, ffn(w.shared_gate_up[e], w.shared_down[e], h));
  return out;
}

std::vector<double> TestModel::logits(const std::vector<int32_t>& ids, size_t n_out, KvFormat format) const {
  const auto d = static_cast<size_t>(shape.d), dh = static_cast<size_t>(shape.dh);
  const auto n_head = static_cast<size_t>(shape.n_head), n_kv = static_cast<size_t>(shape.n_kv);
  std::vector<Vector> x;
  for (const int32_t id : ids) x.emplace_back(embed_.begin() + id * shape.d, embed_.begin() + (id + 1) * shape.d);
  for (const InferLayer& w : layers_) {
    std::vector<Vector> keys, values;
    for (size_t t = 0; t < x.size(); t++) {
      const Vector qkv = times(w.qkv, normed(x[t].data(), w.input_norm, d));
      Vector k, v(qkv.end() - static_cast<int64_t>(n_kv * dh), qkv.end()), attn;
      for (size_t h = 0; h < n_kv; h++) {
        const Vector one = rotated(&qkv[(n_head + h) * dh], w.k_norm, t);
        k.insert(k.end(), one.begin(), one.end());
      }
      for (Vector* row : {&k, &v}) {
        for (size_t h = 0; h < n_kv; h++) {
          double top = 0;
          for (size_t i = 0; i < dh; i++) top = std::max(top, std::abs((*row)[h * dh + i]));
          for (size_t i = 0; i < dh; i++) (*row)[h * dh + i] = round_kv(format, (*row)[h * dh + i], top);
        }
      }
      keys.push_back(k), values.push_back(v);
      for (size_t h = 0; h < n_head; h++) {
        const Vector q = rotated(&qkv[h * dh], w.q_norm, t);
        const size_t at = h / (n_head / n_kv) * dh;
        Vector p, out(dh);
        double sum = 0;
        for (size_t j = 0; j <= t; j++) {
          double s = 0;
          for (size_t i = 0; i < dh; i++) s += q[i] * keys[j][at + i];
          p.push_back(std::exp(s * view.attention_scale));
          sum += p.back();
        }
        for (size_t j = 0; j <= t; j++)
          for (size_t i = 0; i < dh; i++) out[i] += p[j] / sum * values[j][at + i];
        attn.insert(attn.end(), out.begin(), out.end());
      }
      const Vector o = times(w.o, attn);
      for (size_t i = 0; i < d; i++) x[t][i] += o[i];
      const Vector f = ffn_of_layer(w, normed(x[t].data(), w.post_norm, d));
      for (size_t i = 0; i < d; i++) x[t][i] += f[i];
    }
  }
  Vector out;
  for (size_t t = x.size() - n_out; t < x.size(); t++) {
    const Vector y = times(view.head, normed(x[t].data(), view.final_norm, d));
    out.insert(out.end(), y.begin(), y.end());
  }
  return out;
}

// Sequences with paged keys and values; step() feeds the next tokens of some of them.
class Session {
 public:
  Session(const TestModel& model, const InferKernels& kernels, KvFormat format, bool invariant)
      : model_(model), kernels_(kernels), invariant_(invariant) {
    const int64_t width = model.shape.n_kv * model.shape.dh;
    const size_t n = static_cast<size_t>(model.shape.layers * n_row * width);
    for (int i = 0; i < 2; i++) {
      cache_.emplace_back(n * (format == KvFormat::f32 ? 4 : format == KvFormat::i8 ? 1 : 2));
      scales_.emplace_back(n / static_cast<size_t>(model.shape.dh) * 4);
    }
    // Rows that no token wrote hold NaN: nothing may read them.
    if (format != KvFormat::i8) std::memset(cache_[0].data(), 0xff, n * 2), std::memset(cache_[1].data(), 0xff, n * 2);
    kv_ = {format,
           cache_[0].data(),
           cache_[1].data(),
           reinterpret_cast<float*>(scales_[0].data()),
           reinterpret_cast<float*>(scales_[1].data()),
           n_row * width};
  }
  // Feeds ids[s] (may be empty) to sequence s; returns the logits of all tokens in order.
  std::vector<float> step(const std::vector<std::vector<int32_t>>& ids) {
    tables_.resize(std::max(tables_.size(), ids.size()));
    lens_.resize(tables_.size());
    std::vector<int32_t> all, positions, slots, cu{0}, lens, table, out_rows;
    constexpr int64_t ld = max_pos / block + 1;
    for (size_t s = 0; s < ids.size(); s++) {
      if (ids[s].empty()) continue;
      for (const int32_t id : ids[s]) {
        const int32_t pos = lens_[s]++;
        if (pos % block == 0) tables_[s].push_back(next_block());
        all.push_back(id), positions.push_back(pos);
        slots.push_back(tables_[s].back() + pos % block);
        out_rows.push_back(static_cast<int32_t>(out_rows.size()));
      }
      cu.push_back(static_cast<int32_t>(all.size()));
      lens.push_back(lens_[s]);
      table.insert(table.end(), tables_[s].begin(), tables_[s].end());
      table.resize(lens.size() * ld, -1000000);
    }
    const auto n_tok = static_cast<int64_t>(all.size());
    Guarded scratch(cpu::infer_scratch_bytes(model_.view, n_tok, n_tok));
    Guarded logits(static_cast<size_t>(n_tok * model_.shape.vocab) * 4);
    const InferStep s{.n_tok = n_tok,
                      .n_seq = static_cast<int64_t>(lens.size()),
                      .n_out = n_tok,
                      .ids = all.data(),
                      .positions = positions.data(),
                      .slots = slots.data(),
                      .cu = cu.data(),
                      .kv_len = lens.data(),
                      .table = table.data(),
                      .table_ld = ld,
                      .block_shift = block_shift,
                      .out_rows = out_rows.data(),
                      .logits = reinterpret_cast<float*>(logits.data())};
    cpu::infer_step_with(kernels_, model_.view, kv_, s, scratch.data(), invariant_);
    EXPECT_TRUE(scratch.intact() && logits.intact());
    for (int i = 0; i < 2; i++)
      EXPECT_TRUE(cache_[static_cast<size_t>(i)].intact() && scales_[static_cast<size_t>(i)].intact());
    const auto* p = reinterpret_cast<const float*>(logits.data());
    return {p, p + n_tok * model_.shape.vocab};
  }

 private:
  static constexpr int block_shift = 4, block = 1 << block_shift;
  static constexpr int64_t n_row = 1024;
  int32_t next_block() {  // not in order
    const int64_t n = n_row / block;
    EXPECT_LT(next_, n);
    return static_cast<int32_t>(next_++ * 5 % n * block);
  }
  const TestModel& model_;
  const InferKernels& kernels_;
  bool invariant_;
  InferKv kv_;
  int64_t next_ = 0;
  std::vector<Guarded> cache_, scales_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<int32_t> lens_;
};

std::vector<int32_t> random_ids(size_t n, int64_t vocab, uint32_t seed) {
  std::mt19937 gen(seed);
  std::vector<int32_t> v(n);
  for (int32_t& x : v) x = static_cast<int32_t>(gen() % static_cast<uint32_t>(vocab));
  return v;
}

double relative_error(const float* a, const double* b, size_t n) {
  double diff = 0, norm = 0;
  for (size_t i = 0; i < n; i++) diff += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(diff / norm);
}

// The error that all rows but the worst eighth stay below: rounding may send a token to another expert.
double usual_error(const float* a, const double* b, size_t rows, size_t n) {
  std::vector<double> errors;
  for (size_t r = 0; r < rows; r++) errors.push_back(relative_error(a + r * n, b + r * n, n));
  std::sort(errors.begin(), errors.end());
  return errors[rows - 1 - rows / 8];
}

class Threads {
 public:
  explicit Threads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before_); }

 private:
  int before_;
};

}  // namespace

TEST(Infer, PackedWeightsStandForTheirMatrix) {
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::i8}) {
    for (const int64_t n : {1, 15, 16, 17, 50}) {
      for (const int64_t k : {1, 31, 32, 33, 64, 100}) {
        std::vector<float> w = random_values(n * k, 7, 1.0f);
        if (k > 31) std::fill_n(w.begin() + k / 32 * 32 - 32, 32, 0.0f);  // a group of zeros
        Guarded packed(cpu::packed_bytes(format, n, k));
        cpu::pack_matrix(format, packed.data(), w.data(), n, k);
        ASSERT_TRUE(packed.intact());
        std::vector<float> back(w.size());
        const InferMatrix m{format, packed.data(), nullptr, n, k};
        cpu::unpack_rows(m, 0, n / 2, back.data());
        cpu::unpack_rows(m, n / 2, n, back.data() + n / 2 * k);
        for (int64_t r = 0; r < n; r++) {
          for (int64_t i = 0; i < k; i++) {
            const float x = w[static_cast<size_t>(r * k + i)];
            float bound = std::abs(x) * 0x1p-8f;
            if (format == WeightFormat::f32) bound = 0;
            if (format == WeightFormat::i8) {
              float top = 0;
              for (int64_t j = i / 32 * 32; j < std::min(k, i / 32 * 32 + 32); j++)
                top = std::max(top, std::abs(w[static_cast<size_t>(r * k + j)]));
              bound = top / 127 * 0.57f;  // half a step; the scale itself is rounded to f16, 127 / 2048 of a step
            }
            ASSERT_LE(std::abs(back[static_cast<size_t>(r * k + i)] - x), bound)
                << n << "x" << k << " at " << r << "," << i;
          }
        }
      }
    }
  }
}

TEST(Infer, StepsMatchTheReference) {
  for (const Shape& shape : shapes) {
    for (const WeightFormat weights : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::i8}) {
      const TestModel model(shape, weights);
      for (const KvFormat kv : {KvFormat::f32, KvFormat::bf16, KvFormat::f16, KvFormat::i8}) {
        if (kv != KvFormat::f32 && &shape != &shapes[0] && &shape != &shapes[3]) continue;
        const size_t long_len = shape.layers > 1 ? 100 : 200;
        const std::vector<int32_t> a = random_ids(long_len, shape.vocab, 1), b = random_ids(9, shape.vocab, 2);
        const std::vector<double> ref_a = model.logits(a, a.size(), kv), ref_b = model.logits(b, b.size(), kv);
        const double tolerance = (weights == WeightFormat::f32    ? 2e-6
                                  : weights == WeightFormat::bf16 ? 0.02
                                                                  : 0.03) +
                                 (kv == KvFormat::f32   ? 0
                                  : kv == KvFormat::f16 ? 1e-3
                                                        : 6e-3);
        int threads = 0;
        for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
          const Threads team(threads++ % 4 + 1);
          Session session(model, kernels, kv, false);
          const auto v = static_cast<size_t>(shape.vocab);
          const auto check = [&](const std::vector<float>& got, size_t at, const std::vector<double>& ref, size_t first,
                                 size_t n, const char* what) {
            EXPECT_LT(usual_error(got.data() + at * v, ref.data() + first * v, n, v), tolerance)
                << shape.name << " weights " << static_cast<int>(weights) << " kv " << static_cast<int>(kv) << " "
                << isa_name(isa) << " " << what;
          };
          const auto part = [](const std::vector<int32_t>& ids, size_t from, size_t to) {
            return std::vector<int32_t>(ids.begin() + static_cast<int64_t>(from),
                                        ids.begin() + static_cast<int64_t>(to));
          };
          const size_t l = long_len - 4;
          check(session.step({part(a, 0, l)}), 0, ref_a, 0, l, "prefill");
          check(session.step({part(a, l, l + 1)}), 0, ref_a, l, 1, "decode");
          std::vector<float> got = session.step({part(a, l + 1, l + 2), part(b, 0, 5)});
          check(got, 0, ref_a, l + 1, 1, "mixed decode");
          check(got, 1, ref_b, 0, 5, "mixed prefill");
          got = session.step({part(a, l + 2, l + 3), part(b, 5, 6)});
          check(got, 0, ref_a, l + 2, 1, "decode of two");
          check(got, 1, ref_b, 5, 1, "decode of two, second");
          got = session.step({part(a, l + 3, l + 4), part(b, 6, 9), part(b, 0, 1), part(b, 0, 1), part(b, 0, 1),
                              part(a, 0, 1), part(a, 0, 1), part(a, 0, 1), part(a, 0, 2)});
          check(got, 0, ref_a, l + 3, 1, "many");
          check(got, 1, ref_b, 6, 3, "many, second");
          check(got, 4, ref_b, 0, 1, "many, third");
          check(got, 10, ref_a, 0, 2, "many, last");
        }
      }
    }
  }
}

TEST(Infer, ManySequencesDecodeAlike) {
  const TestModel model(shapes[0], WeightFormat::bf16);
  for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
    for (const int threads : {1, 3, 4}) {
      const Threads team(threads);
      Session session(model, kernels, KvFormat::bf16, false);
      std::vector<std::vector<int32_t>> ids(20);
      std::vector<std::vector<double>> refs;
      for (size_t s = 0; s < ids.size(); s++) {
        ids[s] = random_ids(1 + s * 7 % 31, model.shape.vocab, static_cast<uint32_t>(s));
        refs.push_back(model.logits(ids[s], 1, KvFormat::bf16));
      }
      std::vector<std::vector<int32_t>> rest(ids.size()), last(ids.size());
      for (size_t s = 0; s < ids.size(); s++)
        rest[s].assign(ids[s].begin(), ids[s].end() - 1), last[s] = {ids[s].back()};
      session.step(rest);
      const std::vector<float> got = session.step(last);
      const auto v = static_cast<size_t>(model.shape.vocab);
      for (size_t s = 0; s < ids.size(); s++)
        EXPECT_LT(relative_error(got.data() + s * v, refs[s].data(), v), 0.025) << isa_name(isa) << " sequence " << s;
    }
  }
}

// A sequence's bits are the same in one piece, in chunks, token by token, alone and among others, on any team.
TEST(Infer, BatchInvariantModeRepeatsBits) {
  for (const Shape& shape : shapes) {
    for (const WeightFormat weights : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::i8}) {
      const TestModel model(shape, weights);
      const auto v = static_cast<size_t>(shape.vocab);
      const std::vector<int32_t> ids = random_ids(75, shape.vocab, 5);
      for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
        std::vector<float> whole;
        {
          const Threads team(1);
          whole = Session(model, kernels, KvFormat::bf16, true).step({ids});
        }
        const Threads team(4);
        Session session(model, kernels, KvFormat::bf16, true);
        std::vector<float> pieces;
        for (size_t at = 0, n = 1; at < ids.size(); at += n, n = n % 37 * 3 + 1) {
          n = std::min(n, ids.size() - at);
          const std::vector<int32_t> chunk(ids.begin() + static_cast<int64_t>(at),
                                           ids.begin() + static_cast<int64_t>(at + n));
          const std::vector<float> got =
              session.step({random_ids(at % 5, shape.vocab, 3), chunk, random_ids(at % 3, shape.vocab, 4)});
          const auto from = got.begin() + static_cast<int64_t>(at % 5 * v);
          pieces.insert(pieces.end(), from, from + static_cast<int64_t>(n * v));
        }
        ASSERT_EQ(pieces.size(), whole.size());
        EXPECT_EQ(std::memcmp(pieces.data(), whole.data(), whole.size() * 4), 0)
            << shape.name << " weights " << static_cast<int>(weights) << " " << isa_name(isa);
      }
    }
  }
}

TEST(Infer, NotANumberReachesItsOwnSequenceOnly) {
  for (const WeightFormat weights : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::i8}) {
    for (const float bad : {NAN, INFINITY}) {
      TestModel model(shapes[0], weights);
      model.embed_row(3)[5] = bad;
      const auto v = static_cast<size_t>(model.shape.vocab);
      for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
        for (const size_t prompt : {size_t{1}, size_t{40}}) {
          Session session(model, kernels, KvFormat::bf16, false);
          std::vector<int32_t> sound(prompt, 2), broken(prompt, 2);
          broken[0] = 3;
          session.step({sound, broken});
          const std::vector<float> got = session.step({{1}, {1}});
          for (size_t i = 0; i < 2 * v; i++)
            ASSERT_EQ(std::isnan(got[i]), i >= v)
                << isa_name(isa) << " weights " << static_cast<int>(weights) << " " << i;
        }
      }
    }
  }
}

TEST(Infer, HiddenRowsAndNoLogits) {
  const TestModel model(shapes[0], WeightFormat::f32);
  // One token of one sequence in one run of rows: hidden behind the final norm has unit mean square before its weight.
  std::vector<float> k(static_cast<size_t>(model.shape.layers * 4 * 64)), vv = k, hidden(64), scale;
  Guarded scratch(cpu::infer_scratch_bytes(model.view, 1, 1));
  const int32_t zero = 0, one = 1, cu[] = {0, 1};
  const InferKv kv{KvFormat::f32, k.data(), vv.data(), nullptr, nullptr, 4 * 64};
  InferStep s{.n_tok = 1,
              .n_seq = 1,
              .n_out = 1,
              .ids = &one,
              .positions = &zero,
              .slots = &zero,
              .cu = cu,
              .kv_len = &one,
              .table = &zero,
              .table_ld = 1,
              .block_shift = 30,
              .out_rows = &zero};
  s.hidden = hidden.data();
  cpu::infer_step(model.view, kv, s, scratch.data(), false);
  double square = 0;
  for (size_t i = 0; i < 64; i++) square += std::pow(hidden[i] / model.view.final_norm[i], 2);
  EXPECT_NEAR(square / 64, 1, 1e-4);
  s.n_out = 0, s.hidden = nullptr;
  cpu::infer_step(model.view, kv, s, scratch.data(), false);
  EXPECT_TRUE(scratch.intact());
}

}  // namespace mm
