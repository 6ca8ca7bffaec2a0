// The persistent decode step against the CPU's step in fp32 on the same (rounded) weights, keys and values.
#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "kernels/cases/cuda_arrays.h"
#include "kernels/cpu/infer.h"
#include "kernels/cuda/infer_kernels.h"

namespace mm {
namespace {

using namespace cases;  // NOLINT(google-build-using-namespace)

using PersistentDecode = CudaTest;

struct Shape {
  const char* name;
  int64_t d, ff, layers, vocab;
  int n_head, n_kv, dh;
  bool qk_norm;
};
const Shape shapes[] = {{"qwen3", 128, 448, 2, 300, 4, 2, 32, true},
                        {"llama", 256, 512, 2, 1003, 8, 2, 64, false},
                        {"heads96", 384, 640, 2, 520, 4, 2, 96, true},
                        {"heads128", 256, 768, 1, 70, 2, 2, 128, true}};
// Those with kernels of their own, where a single row's attention has blocks of its own up to 1,120 and 2,240 keys.
const Shape known_shapes[] = {{"minimind-3", 768, 2432, 2, 1003, 8, 4, 96, true},
                              {"minimind2-small", 512, 1408, 3, 1600, 8, 2, 64, false}};
constexpr int64_t max_pos = 2304, block_rows = 16, pool_rows = 8192;

// The same random model on the CPU (fp32) and on the GPU (bf16 or int8).
class Pair {
 public:
  Pair(const Shape& shape, WeightFormat format) : format_(format) {
    const int64_t width = (shape.n_head + 2 * shape.n_kv) * shape.dh;
    for (int64_t l = 0; l < shape.layers; l++) {
      InferLayer c, g;
      norm(shape.d, c.input_norm, g.input_norm), norm(shape.d, c.post_norm, g.post_norm);
      if (shape.qk_norm) norm(shape.dh, c.q_norm, g.q_norm), norm(shape.dh, c.k_norm, g.k_norm);
      matrix(width, shape.d, c.qkv, g.qkv), matrix(shape.d, shape.n_head * shape.dh, c.o, g.o);
      matrix(2 * shape.ff, shape.d, c.gate_up, g.gate_up), matrix(shape.d, shape.ff, c.down, g.down);
      cpu_layers_.push_back(c), gpu_layers_.push_back(g);
    }
    std::vector<float> cos, sin;
    for (int64_t p = 0; p < max_pos; p++) {
      for (int i = 0; i < shape.dh / 2; i++) {
        const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * i / shape.dh);
        cos.push_back(static_cast<float>(std::cos(angle))), sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    cpu.d_model = shape.d, cpu.d_ff = shape.ff, cpu.n_layer = shape.layers, cpu.n_vocab = shape.vocab;
    cpu.n_head = shape.n_head, cpu.n_kv_head = shape.n_kv, cpu.d_head = shape.dh;
    cpu.attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.dh));
    gpu = cpu;
    both(cos, cpu.cos, gpu.cos), both(sin, cpu.sin, gpu.sin), norm(shape.d, cpu.final_norm, gpu.final_norm);
    matrix(shape.vocab, shape.d, cpu.head, gpu.head);
    const std::vector<float> embed = rounded(bf16, normal(static_cast<size_t>(shape.vocab * shape.d), stream_++));
    kept_.push_back(embed);
    cpu.embed = {WeightFormat::f32, kept_.back().data(), nullptr, shape.vocab, shape.d};
    gpu.embed = {WeightFormat::bf16, bytes(encode(bf16, embed)), nullptr, shape.vocab, shape.d};
    cpu.layers = cpu_layers_.data(), gpu.layers = gpu_layers_.data();
  }
  InferModel cpu, gpu;

 private:
  const void* bytes(const Bytes& b) {
    on_gpu_.push_back(std::make_unique<Device<unsigned char>>(b));
    return on_gpu_.back()->pointer();
  }
  void both(const std::vector<float>& x, const float*& c, const float*& g) {
    kept_.push_back(x);
    c = kept_.back().data(), g = static_cast<const float*>(bytes(encode(f32, x)));
  }
  void norm(int64_t n, const float*& c, const float*& g) {
    std::vector<float> x = normal(static_cast<size_t>(n), stream_++, 0.2f);
    for (float& v : x) v += 1.0f;
    both(x, c, g);
  }
  void matrix(int64_t n, int64_t k, InferMatrix& c, InferMatrix& g) {
    std::vector<float> w = normal(static_cast<size_t>(n * k), stream_++, 1.0f / std::sqrt(static_cast<float>(k)));
    g = {format_, nullptr, nullptr, n, k};
    if (format_ == WeightFormat::bf16) {
      g.data = bytes(encode(bf16, w));
      w = rounded(bf16, w);
    } else {
      Bytes q(w.size());
      std::vector<float> scales(w.size() / weight_group);
      for (size_t i = 0; i < w.size(); i += weight_group) {
        float top = 0;
        for (size_t j = 0; j < weight_group; j++) top = std::max(top, std::abs(w[i + j]));
        const float scale = rounded(f16, {top / 127.0f})[0];
        scales[i / weight_group] = scale;
        for (size_t j = 0; j < weight_group; j++) {
          const float v = std::clamp(std::nearbyint(w[i + j] / scale), -127.0f, 127.0f);
          q[i + j] = static_cast<unsigned char>(static_cast<int8_t>(v)), w[i + j] = v * scale;
        }
      }
      g.data = bytes(q), g.scales = bytes(encode(f16, scales));
    }
    packed_.emplace_back(cpu::packed_bytes(WeightFormat::f32, n, k) + 64);
    void* to = packed_.back().data() + (64 - reinterpret_cast<uintptr_t>(packed_.back().data()) % 64) % 64;
    cpu::pack_matrix(WeightFormat::f32, to, w.data(), n, k);
    c = {WeightFormat::f32, to, nullptr, n, k};
  }
  WeightFormat format_;
  uint64_t stream_ = 1;
  std::vector<InferLayer> cpu_layers_, gpu_layers_;
  std::vector<std::vector<float>> kept_;
  std::vector<Bytes> packed_;
  std::vector<std::unique_ptr<Device<unsigned char>>> on_gpu_;
};

// Keys or values of all layers, random, as the GPU's format and as the fp32 numbers that it stands for.
struct Pool {
  std::vector<float> values, scales;
  Bytes data;
  Pool(KvFormat format, size_t n, size_t width, uint64_t stream) : values(normal(n, stream)) {
    if (format == KvFormat::bf16) {
      data = encode(bf16, values), values = rounded(bf16, values);
      return;
    }
    data.resize(n), scales.resize(n / width);
    for (size_t i = 0; i < n; i++) {
      scales[i / width] = 0.02f + 1e-4f * static_cast<float>(i / width % 50);
      const float q = std::clamp(std::nearbyint(values[i] / scales[i / width]), -127.0f, 127.0f);
      data[i] = static_cast<unsigned char>(static_cast<int8_t>(q)), values[i] = q * scales[i / width];
    }
  }
};

// [layer, row, head, d_head] as the CPU has it: [layer, head, row, d_head].
std::vector<float> by_head(const Shape& shape, const std::vector<float>& x) {
  std::vector<float> to;
  const auto dh = static_cast<std::ptrdiff_t>(shape.dh);
  for (int64_t l = 0; l < shape.layers; l++)
    for (int64_t h = 0; h < shape.n_kv; h++)
      for (int64_t r = 0; r < pool_rows; r++) {
        const auto from = x.begin() + ((l * pool_rows + r) * shape.n_kv + h) * dh;
        to.insert(to.end(), from, from + dh);
      }
  return to;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double d = 0, n = 0;
  for (size_t i = 0; i < a.size(); i++) {
    d += std::pow(static_cast<double>(a[i]) - b[i], 2), n += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(d / n);
}

// Two steps of sequences with so many keys; the second takes the tokens that the first drew. Each is done `again` times
// more.
void run(const Shape& shape, Pair& pair, KvFormat format, const std::vector<int32_t>& depths, int again = 1) {
  SCOPED_TRACE(std::string(shape.name) + (format == KvFormat::i8 ? ", int8 keys" : "") + ", rows " +
               std::to_string(depths.size()));
  const auto n = depths.size();
  const int64_t width = shape.n_kv * shape.dh, stride = pool_rows * width;
  const auto all = static_cast<size_t>(shape.layers * stride), vocab = static_cast<size_t>(shape.vocab);
  Pool keys(format, all, static_cast<size_t>(shape.dh), 90), values(format, all, static_cast<size_t>(shape.dh), 91);
  const Device<unsigned char> k(keys.data), v(values.data);
  const Device<float> k_scale(keys.scales), v_scale(values.scales);
  const InferKv gpu_kv = {format, k.pointer(), v.pointer(), k_scale.pointer(), v_scale.pointer(), stride};
  std::vector<float> cpu_keys = by_head(shape, keys.values), cpu_values = by_head(shape, values.values);
  const InferKv cpu_kv = {KvFormat::f32, cpu_keys.data(), cpu_values.data(), nullptr, nullptr, stride};

  const char* why = nullptr;
  const std::unique_ptr<cuda::PersistentDecode, void (*)(cuda::PersistentDecode*)> plan(
      cuda::persistent_decode_create(context(), pair.gpu, gpu_kv, {.max_rows = 8, .max_keys = max_pos}, &why),
      [](cuda::PersistentDecode* p) { cuda::persistent_decode_destroy(p); });
  if (plan == nullptr) GTEST_SKIP() << "NOT TESTED: " << why;

  // Blocks in a shuffled order.
  const size_t ld = static_cast<size_t>(*std::max_element(depths.begin(), depths.end()) / block_rows + 2);
  std::vector<int32_t> table(n * ld), ids(n), slots(n), positions(n), kv_len(n), cu(n + 1), rows(n);
  for (size_t i = 0; i < n * ld; i++) table[i] = static_cast<int32_t>(i * 37 % (pool_rows / block_rows) * block_rows);
  std::iota(cu.begin(), cu.end(), 0), std::iota(rows.begin(), rows.end(), 0);
  ASSERT_LE(n * ld, static_cast<size_t>(pool_rows / block_rows));
  std::vector<float> logits(n * vocab), hidden(n * static_cast<size_t>(shape.d));
  std::vector<char> scratch(cpu::infer_scratch_bytes(pair.cpu, 8, 8) + 64);
  void* const aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;

  const Device<int32_t> d_table(table), d_next(std::vector<int32_t>(n, -5));
  std::vector<PersistentRow> step_rows(n);
  const Device<float> d_logits(logits), d_hidden(hidden);
  std::vector<RowSampling> greedy(n);
  for (RowSampling& s : greedy) s.temperature = 0;
  // Steps of one row and of several take turns with the exchange's memory.
  for (const size_t m : {size_t{1}, n, size_t{1}, size_t{1}}) {
    const std::vector<PersistentRow> nothing(m, {.kv_len = 1});
    cuda::persistent_decode_run(
        context(), plan.get(),
        {.rows = nothing, .table = d_table, .table_ld = static_cast<int64_t>(ld), .block_shift = 4});
  }
  std::vector<int32_t> drawn(n);
  for (int32_t step = 0; step < 2; step++) {
    std::vector<int32_t> gpu_ids(n);
    for (size_t i = 0; i < n; i++) {
      ids[i] = step == 0 ? static_cast<int32_t>(i * 7 % vocab) : drawn[i];
      gpu_ids[i] = step == 0 ? ids[i] : -1 - static_cast<int32_t>(i);
      positions[i] = depths[i] + step, kv_len[i] = positions[i] + 1;
      slots[i] = table[i * ld + static_cast<size_t>(positions[i] / block_rows)] +
                 positions[i] % static_cast<int32_t>(block_rows);
    }
    InferStep s = {
        .n_tok = static_cast<int64_t>(n), .n_seq = static_cast<int64_t>(n), .n_out = static_cast<int64_t>(n)};
    s.ids = ids.data(), s.positions = positions.data(), s.slots = slots.data(), s.cu = cu.data();
    s.kv_len = kv_len.data(), s.table = table.data(), s.table_ld = static_cast<int64_t>(ld), s.block_shift = 4;
    s.out_rows = rows.data(), s.logits = logits.data(), s.hidden = hidden.data();
    cpu::infer_step(pair.cpu, cpu_kv, s, aligned, false);

    for (size_t i = 0; i < n; i++) step_rows[i] = {gpu_ids[i], positions[i], slots[i], kv_len[i]};
    PersistentStepBatch b = {.rows = step_rows, .sampling = greedy};
    b.table = d_table, b.table_ld = s.table_ld, b.block_shift = s.block_shift;
    b.prev_ids = d_next, b.next_ids = d_next, b.logits = d_logits, b.hidden = d_hidden;
    cuda::persistent_decode_run(context(), plan.get(), b);
    const std::vector<float> got = d_logits.get();
    EXPECT_LT(distance(got, logits), 1.5e-2) << "logits of step " << step;
    EXPECT_LT(distance(d_hidden.get(), hidden), 1.5e-2) << "hidden of step " << step;
    drawn = d_next.get();
    for (size_t i = 0; i < n; i++) {
      const auto row = got.begin() + static_cast<std::ptrdiff_t>(i * vocab),
                 end = row + static_cast<std::ptrdiff_t>(vocab);
      EXPECT_EQ(drawn[i], std::max_element(row, end) - row) << "row " << i;
    }
    // The same step again gives the same bits. (Copies that are not waited for show in one step of a few hundred.)
    b.sampling = {}, b.next_ids = nullptr;
    for (int i = 0; step == 0 && i < again; i++) {
      cuda::persistent_decode_run(context(), plan.get(), b);
      ASSERT_EQ(d_logits.get(), got) << "repetition " << i;
    }
  }
}

TEST_F(PersistentDecode, EqualsTheStepOfTheCpu) {
  for (const Shape& shape : shapes) {
    for (const WeightFormat weights : {WeightFormat::bf16, WeightFormat::i8}) {
      Pair pair(shape, weights);
      for (const KvFormat kv : {KvFormat::bf16, KvFormat::i8}) {
        run(shape, pair, kv, {0});
        run(shape, pair, kv, {70, 15});
        run(shape, pair, kv, {300, 0, 1, 15, 16, 17, 63, 64});
      }
    }
  }
}

TEST_F(PersistentDecode, KnownShapesEqualTheStepOfTheCpu) {
  for (const Shape& shape : known_shapes) {
    for (const WeightFormat weights : {WeightFormat::bf16, WeightFormat::i8}) {
      Pair pair(shape, weights);
      for (const KvFormat kv : {KvFormat::bf16, KvFormat::i8}) {
        for (const int32_t depth : {0, 1, 15, 16, 63, 127, 128, 300, 1118, 1119, 2239}) run(shape, pair, kv, {depth});
        run(shape, pair, kv, {70, 15});
        run(shape, pair, kv, {300, 0, 1, 15, 16, 17, 63, 64});
      }
    }
  }
}

TEST_F(PersistentDecode, LongRowsGiveTheSameBitsAgain) {
  for (const Shape& shape : known_shapes) {
    Pair pair(shape, WeightFormat::bf16);
    for (const KvFormat kv : {KvFormat::bf16, KvFormat::i8}) {
      run(shape, pair, kv, {800, 700, 0, 1, 15, 16, 100, 600}, 1000);
      run(shape, pair, kv, {1000, 1500, 1300}, 1000);
      run(shape, pair, kv, {1100}, 1000);
    }
  }
}

TEST_F(PersistentDecode, SaysWhyItCannot) {
  Pair pair(shapes[0], WeightFormat::bf16);
  pair.gpu.n_expert = 4;
  const char* why = nullptr;
  EXPECT_EQ(cuda::persistent_decode_create(context(), pair.gpu, {.format = KvFormat::bf16}, {}, &why), nullptr);
  EXPECT_STREQ(why, "a mixture of experts");
}

}  // namespace
}  // namespace mm
#endif
