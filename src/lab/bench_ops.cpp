#include "lab/bench_ops.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/progress.h"
#include "base/rng.h"
#include "kernels/machine.h"
#include "kernels/ops.h"
#include "model/lm_head.h"
#include "tensor/host_copy.h"

namespace mm {

namespace {

class OpBench {
 public:
  OpBench(const Device& dev, int rounds)
      : dev_(dev), rounds_(rounds), peak_(measure_peak_flops(dev)), bandwidth_(measure_bandwidth(dev)) {}

  View tensor(DType t, Shape shape, float scale = 1.0f) {
    buffers_.emplace_back(static_cast<size_t>(shape.numel()) * dtype_size(t), dev_.memory());
    const View v(buffers_.back().data(), t, shape);
    if (t == DType::i32) return v;
    const int64_t piece = std::min<int64_t>(v.numel(), 1 << 18);  // the same numbers again and again
    std::vector<float> numbers(static_cast<size_t>(piece));
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] = scale * philox_normal(3, buffers_.size(), i);
    for (int64_t at = 0; at < v.numel(); at += piece) {
      numbers.resize(static_cast<size_t>(std::min(piece, v.numel() - at)));
      copy_from_host(dev_, v.reshape({v.numel()}).row_slice(at, at + static_cast<int64_t>(numbers.size())), numbers);
    }
    return v;
  }
  View act(Shape shape, float scale = 1.0f) { return tensor(dev_.act, shape, scale); }
  View ints(const std::vector<int32_t>& values) {
    const View v = tensor(DType::i32, {static_cast<int64_t>(values.size())});
    if (dev_.on_gpu()) {
      copy_async(v.data, values.data(), v.bytes(), dev_.stream);
      synchronize(dev_.stream);
    } else {
      std::copy(values.begin(), values.end(), v.as<int32_t>());
    }
    return v;
  }

  void time(const std::string& op, const std::string& shape, double bytes, double flops,
            const std::function<void()>& run) {
    const auto wait = [&] {
      if (dev_.on_gpu()) synchronize(dev_.stream);
    };
    for (int i = 0; i < 3; i++) run();
    wait();
    std::vector<double> us;
    const int launches = dev_.on_gpu() ? 20 : 1;
    for (int r = 0; r < rounds_; r++) {
      const double start = now_seconds();
      for (int i = 0; i < launches; i++) run();
      wait();
      us.push_back(1e6 * (now_seconds() - start) / launches);
    }
    std::sort(us.begin(), us.end());
    const double t = us[us.size() / 2];
    ops_.push_back({{"op", op},
                    {"shape", shape},
                    {"us", t},
                    {"us_min", us.front()},
                    {"us_max", us.back()},
                    {"gflops", flops / t * 1e-3},
                    {"share_of_peak", flops / t * 1e6 / peak_},
                    {"gbytes_per_second", bytes / t * 1e-3},
                    {"share_of_bandwidth", bytes / t * 1e6 / bandwidth_}});
  }

  void drop_tensors() { buffers_.clear(); }
  const Device& device() const { return dev_; }
  ordered_json report() const {
    return {{"bench", "ops"},
            {"processor", dev_.on_gpu() ? cuda_status().name : cpu_features().model_name},
            {"dtype", dtype_name(dev_.on_gpu() ? dev_.act : dev_.matmul)},
            {"peak_flops", peak_},
            {"bandwidth", bandwidth_},
            {"ops", ops_}};
  }

 private:
  Device dev_;
  int rounds_;
  double peak_, bandwidth_;
  std::vector<Buffer> buffers_;
  ordered_json ops_ = ordered_json::array();
};

void bench_norm(OpBench& b, int64_t n, int64_t d) {
  const Device& dev = b.device();
  const View x = b.act({n, d}), y = b.act({n, d}), dx = b.act({n, d}), w = b.act({d});
  const View rstd = b.tensor(DType::f32, {n}), dw = b.tensor(DType::f32, {d});
  const std::string shape = fmt::format("{}x{}", n, d);
  const double bytes = static_cast<double>(x.bytes()), flops = static_cast<double>(n * d);
  b.time("rmsnorm_fwd", shape, 2 * bytes, 4 * flops, [&] { ops::rmsnorm_fwd(dev, y, rstd, x, w, 1e-6f); });
  b.time("rmsnorm_fwd+bwd", shape, 6 * bytes, 14 * flops, [&] {
    ops::rmsnorm_fwd(dev, y, rstd, x, w, 1e-6f);
    ops::rmsnorm_bwd(dev, dx, dw, y, x, rstd, w);
  });
  b.drop_tensors();
}

void bench_ffn(OpBench& b, int64_t n, int64_t d, int64_t f) {
  const Device& dev = b.device();
  const View gate_up = b.act({n, 2 * f}), act = b.act({n, f}), dact = b.act({n, f}), dgate_up = b.act({n, 2 * f});
  const View x = b.act({n, d}), w = b.act({2 * f, d}, 0.02f), down = b.act({d, f}, 0.02f), dy = b.act({n, d});
  const std::string shape = fmt::format("{}x{}x2*{}", n, d, f);
  const double bytes = static_cast<double>(act.bytes()), flops = static_cast<double>(n * f),
               product = 2.0 * static_cast<double>(n * d * f);
  b.time("swiglu_fwd", fmt::format("{}x{}", n, f), 3 * bytes, 20 * flops, [&] { ops::swiglu_fwd(dev, act, gate_up); });
  b.time("swiglu_bwd", fmt::format("{}x{}", n, f), 6 * bytes, 30 * flops,
         [&] { ops::swiglu_bwd(dev, dgate_up, act, dact, gate_up); });
  b.time("linear_swiglu_fwd", shape, 3 * bytes + static_cast<double>(x.bytes()), 2 * product,
         [&] { ops::linear_swiglu_fwd(dev, gate_up, act, x, w); });
  b.time("linear_swiglu_bwd", shape, 5 * bytes + static_cast<double>(dy.bytes()), product,
         [&] { ops::linear_swiglu_bwd(dev, dgate_up, act, dact, dy, down, gate_up); });
  b.drop_tensors();
}

void bench_linear(OpBench& b, int64_t m, int64_t n, int64_t k) {
  const Device& dev = b.device();
  const View x = b.act({m, k}), w = b.act({n, k}, 0.02f), y = b.act({m, n}), dx = b.act({m, k});
  const View dw = b.tensor(DType::f32, {n, k});
  const std::string shape = fmt::format("{}x{}x{}", m, n, k);
  const double flops = 2.0 * static_cast<double>(m * n * k);
  const auto bytes = [](std::initializer_list<View> views) {
    double s = 0;
    for (const View& v : views) s += static_cast<double>(v.bytes());
    return s;
  };
  b.time("linear_fwd", shape, bytes({x, w, y}), flops, [&] { ops::linear_fwd(dev, y, x, w); });
  b.time("linear_bwd dx", shape, bytes({y, w, dx}), flops, [&] { ops::linear_bwd(dev, dx, View(), y, View(), w); });
  b.time("linear_bwd dw", shape, bytes({y, x, dw, dw}), flops, [&] { ops::linear_bwd(dev, View(), dw, y, x, w); });
  b.drop_tensors();
}

// Forward and backward of the LM head with cross-entropy, all tokens with a target.
void bench_head(OpBench& b, int64_t n, int64_t d, int64_t v) {
  const Device& dev = b.device();
  ModelConfig c;
  c.hidden_size = d;
  c.vocab_size = v;
  c.num_hidden_layers = 1;
  c.num_attention_heads = c.num_key_value_heads = 1;
  c.head_dim = c.intermediate_size = 64;
  Model model(c, dev.act, dev.memory());
  copy_from_host(dev, model.weights.head, std::vector<float>(static_cast<size_t>(v * d), 0.01f));
  ParamBuffer grads(c, model.table, DType::f32, dev.memory());
  LmHead head(c, dev);
  const View h = b.act({n, d}), dh = b.act({n, d}), logp = b.tensor(DType::f32, {n}), g = b.tensor(DType::f32, {n});
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(v));
  const View targets = b.ints(ids);
  const double flops = 6.0 * static_cast<double>(n * d * v);
  b.time("lm_head+cross_entropy fwd+bwd", fmt::format("{}x{}x{}", n, d, v), static_cast<double>(2 * h.bytes()), flops,
         [&] {
           if (dev.on_gpu()) head.backward_device(dev, model, h, targets.as<int32_t>(), g, dh, grads, logp);
           else head.backward(dev, model, h, ids, g.f32(), dh, grads, logp.f32());
         });
  b.drop_tensors();
}

void bench_attention(OpBench& b, int64_t n_seq, int64_t len, int n_head, int n_kv_head, int d_head) {
  const Device& dev = b.device();
  TokenBatch batch;
  batch.clear();
  for (int64_t s = 0; s < n_seq; s++) {
    for (int64_t t = 0; t < len; t++) {
      batch.ids.push_back(0);
      batch.positions.push_back(static_cast<int32_t>(t));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.n_tok()));
  }
  BatchStage stage(dev, batch.n_tok(), n_kv_head);
  const StagedBatch& s = stage.stage(dev, batch, nullptr);
  const int64_t n = s.n_tok, qw = int64_t{n_head} * d_head, kw = int64_t{n_kv_head} * d_head;
  const View qkv = b.act({n, qw + 2 * kw}), out = b.act({n, qw}), dout = b.act({n, qw}), dqkv = b.act({n, qw + 2 * kw});
  const ops::Attention a{.q = qkv.col_slice(0, qw),
                         .k = qkv.col_slice(qw, qw + kw),
                         .v = qkv.col_slice(qw + kw, qw + 2 * kw),
                         .out = out,
                         .lse = b.tensor(DType::f32, {n, n_head}),
                         .cu = s.cu_seqlens,
                         .n_seq = s.n_seq,
                         .n_tok = n,
                         .pairs = s.pairs,
                         .keys = s.keys,
                         .tiles = s.tiles,
                         .n_tiles = s.n_tiles,
                         .max_tiles = s.max_tiles,
                         .max_len = s.max_len,
                         .n_head = n_head,
                         .n_kv_head = n_kv_head,
                         .d_head = d_head,
                         .scale = 1.0f / std::sqrt(static_cast<float>(d_head))};
  const std::string shape = fmt::format("B{} T{} H{}/{} D{}", n_seq, len, n_head, n_kv_head, d_head);
  const double flops = 4 * s.pairs * n_head * d_head, bytes = static_cast<double>(qkv.bytes() + out.bytes());
  const auto backward = [&] {
    ops::attention_bwd(dev, a, dout, dqkv.col_slice(0, qw), dqkv.col_slice(qw, qw + kw),
                       dqkv.col_slice(qw + kw, qw + 2 * kw));
  };
  b.time("attention_fwd", shape, bytes, flops, [&] { ops::attention_fwd(dev, a); });
  b.time("attention_bwd", shape, 2 * bytes, 2.5 * flops, backward);
  b.time("attention_fwd+bwd", shape, 3 * bytes, 3.5 * flops, [&] {
    ops::attention_fwd(dev, a);
    backward();
  });
  b.drop_tensors();
}

void bench_optimizer(OpBench& b, int64_t n) {
  const Device& dev = b.device();
  const View p = b.tensor(DType::f32, {n}), g = b.tensor(DType::f32, {n}), m = b.tensor(DType::f32, {n}),
             v = b.tensor(DType::f32, {n});
  ops::zero(dev, v);
  int64_t step = 0;
  b.time("adamw (with a wait)", fmt::format("{}", n), 7.0 * static_cast<double>(p.bytes()),
         12.0 * static_cast<double>(n), [&] { ops::adamw(dev, p, g, m, v, {.lr = 1e-4, .step = ++step}); });
  b.drop_tensors();
}

}  // namespace

ordered_json bench_ops(const Device& dev, int64_t tokens, int rounds) {
  MM_CHECK(rounds > 0);
  OpBench b(dev, rounds);
  Progress bar("bench ops", 13, "groups");
  int64_t done = 0;
  const auto group = [&](auto&& f, auto... args) {
    f(b, args...);
    bar.set(++done);
  };
  group(bench_norm, tokens * 8 / 3, int64_t{768});
  group(bench_norm, tokens, int64_t{768});
  group(bench_norm, tokens * 2 / 3, int64_t{4096});
  group(bench_ffn, tokens, int64_t{768}, int64_t{2432});
  for (const auto& [n, k] : {std::pair{1536, 768}, {768, 768}, {4864, 768}, {768, 2432}})
    group(bench_linear, tokens, int64_t{n}, int64_t{k});
  group(bench_head, tokens, int64_t{768}, int64_t{6400});
  group(bench_attention, std::max<int64_t>(1, tokens / 768), int64_t{768}, 8, 4, 96);
  group(bench_attention, std::max<int64_t>(1, tokens * 4 / 3 / 512), int64_t{512}, 8, 2, 64);
  group(bench_attention, std::max<int64_t>(1, tokens * 4 / 3 / 2048), int64_t{2048}, 8, 4, 96);
  group(bench_optimizer, int64_t{64} << 20);
  return b.report();
}

}  // namespace mm
