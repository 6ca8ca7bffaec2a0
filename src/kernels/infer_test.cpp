// The CPU inference step against a plain double-precision model, for every instruction set of the machine.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "base/thread_team.h"
#include "kernels/cases/plain_infer_model.h"
#include "kernels/cpu/infer.h"
#include "kernels/cpu/infer_plan.h"

namespace mm {

namespace {

using namespace cases::infer;  // NOLINT(google-build-using-namespace)

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
    std::vector<int32_t> best(static_cast<size_t>(n_tok), -7);
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
                      .logits = reinterpret_cast<float*>(logits.data()),
                      .best = best.data()};
    cpu::infer_step_with(kernels_, model_.view, kv_, s, scratch.data(), invariant_);
    EXPECT_TRUE(scratch.intact() && logits.intact());
    for (int i = 0; i < 2; i++)
      EXPECT_TRUE(cache_[static_cast<size_t>(i)].intact() && scales_[static_cast<size_t>(i)].intact());
    const auto* p = reinterpret_cast<const float*>(logits.data());
    for (size_t r = 0; r < best.size(); r++) {
      const float *row = p + static_cast<int64_t>(r) * model_.shape.vocab, *end = row + model_.shape.vocab;
      const bool broken = std::any_of(row, end, [](float x) { return !(x < INFINITY); });
      EXPECT_EQ(best[r], broken ? -1 : std::max_element(row, end) - row) << "row " << r;
    }
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

// One token, norms split by columns, several kv heads and layers, keys split over the threads.
TEST(Infer, OneTokenOnSeveralThreads) {
  const Shape shape{"split", 256, 160, 3, 96, 8, 2, 32};
  for (const WeightFormat weights : {WeightFormat::bf16, WeightFormat::i8}) {
    for (const float bad : {0.0f, NAN, INFINITY}) {
      TestModel model(shape, weights);
      model.embed_row(3)[5] += bad;
      const std::vector<int32_t> ids = random_ids(bad == 0 ? 200 : 20, 3, 9);
      const auto v = static_cast<size_t>(shape.vocab);
      const std::vector<double> ref = model.logits(ids, 4, KvFormat::bf16);
      for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
        for (const int threads : {1, 2, 4, 8}) {
          SCOPED_TRACE(std::string(isa_name(isa)) + ", threads " + std::to_string(threads));
          const Threads team(threads);
          Session session(model, kernels, KvFormat::bf16, false);
          session.step({{ids.begin(), ids.end() - 4}});
          for (size_t i = 0; i < 4; i++) {
            const std::vector<float> got = session.step({{ids[ids.size() - 4 + i]}});
            EXPECT_LT(relative_error(got.data(), ref.data() + i * v, v), 0.03) << "token " << i;
          }
          const std::vector<float> broken = session.step({{3}});
          EXPECT_EQ(std::count_if(broken.begin(), broken.end(), [](float x) { return !std::isfinite(x); }),
                    bad == 0 ? 0 : shape.vocab);
        }
      }
    }
  }
}

TEST(Infer, FirstLargest) {
  for (const auto& [isa, kernels] : cpu::all_infer_kernels()) {
    for (const int64_t n : {1, 15, 16, 17, 63, 64, 65, 200}) {
      const auto largest = [&](std::initializer_list<std::pair<int64_t, float>> at, float rest, float* value) {
        std::vector<float> x(static_cast<size_t>(n), rest);
        for (const auto& [i, v] : at)
          if (i < n) x[static_cast<size_t>(i)] = v;
        return kernels.first_largest(x.data(), n, value);
      };
      SCOPED_TRACE(std::string(isa_name(isa)) + ", " + std::to_string(n));
      float value = 0;
      EXPECT_EQ(largest({{n - 1, 3.0f}}, -1.0f, &value), n - 1);
      EXPECT_EQ(value, 3.0f);
      EXPECT_EQ(largest({{n / 2, 3.0f}, {n - 1, 3.0f}}, -1.0f, &value), n / 2);  // the first of equal ones
      EXPECT_EQ(largest({}, -INFINITY, &value), 0);
      EXPECT_EQ(value, -INFINITY);
      for (const float broken : {NAN, INFINITY}) {
        largest({{n - 1, broken}}, 1.0f, &value);
        EXPECT_TRUE(std::isnan(value));
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
