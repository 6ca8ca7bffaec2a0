// Random models for the inference step, of every shape it knows, with a plain double-precision forward to compare with.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/infer.h"
#include "kernels/cpu/infer_plan.h"

namespace mm::cases::infer {

struct Shape {
  const char* name;
  int64_t d, ff, layers, vocab;
  int n_head, n_kv, dh, n_expert = 0, top_k = 0, n_shared = 0;
  bool qk_norm = true, norm_topk = true;
};
inline const Shape shapes[] = {
    {"qwen3", 64, 96, 2, 80, 4, 2, 32},         {"llama", 48, 64, 2, 50, 4, 1, 16, 0, 0, 0, false},
    {"odd", 42, 50, 1, 37, 3, 1, 14},           {"heads96", 96, 160, 1, 96, 2, 2, 96},
    {"top1", 64, 64, 2, 48, 2, 1, 32, 4, 1, 1}, {"top2", 40, 36, 2, 48, 2, 2, 20, 3, 2, 0, true, false}};

inline std::vector<float> random_values(int64_t n, uint32_t seed, float scale, float mean = 0) {
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

inline constexpr int64_t max_pos = 300;

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

inline double round_kv(KvFormat format, double x, double absmax) {
  switch (format) {
    case KvFormat::f32: return static_cast<float>(x);
    case KvFormat::bf16:
      return std::bit_cast<float>((std::bit_cast<uint32_t>(static_cast<float>(x)) + 0x8000u) & ~0xffffu);
    case KvFormat::f16: return std::ldexp(std::nearbyint(std::ldexp(x, 10 - std::ilogb(x))), std::ilogb(x) - 10);
    case KvFormat::i8: return std::nearbyint(x / absmax * 127) * absmax / 127;
  }
  return x;
}

inline std::vector<double> TestModel::ffn_of_layer(const InferLayer& w, const Vector& h) const {
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

inline std::vector<double> TestModel::logits(const std::vector<int32_t>& ids, size_t n_out, KvFormat format) const {
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

}  // namespace mm::cases::infer
