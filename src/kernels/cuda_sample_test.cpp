// Drawing tokens on the GPU against a plain reference in double.
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

using CudaSample = CudaTest;

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
  constexpr double near = 2e-6;
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
  std::sort(pool.begin(), pool.end(),
            [](const Token& a, const Token& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; });
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
  size_t at = 0;
  for (size_t i = 0; i < pool.size(); i++) {
    cumulated += pool[i].prob;
    want.close = want.close || std::abs(u - cumulated / total) < near;
    if (u >= cumulated / total) at = std::min(i + 1, pool.size() - 1);
  }
  want.id = pool[at].id;
  // The order of nearly equal probabilities is a matter of rounding as well.
  for (size_t i = at > 0 ? at - 1 : 0; r.p.top_p < 1.0f && i < std::min(at + 1, pool.size() - 1); i++)
    want.close = want.close || (pool[i].score != pool[i + 1].score && pool[i].score - pool[i + 1].score < 1e-6);
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
  EXPECT_LE(close, rows.size() / 3) << what << ": too many rows are left out for the test to mean something";
}

SampleRow make_row(size_t n_vocab, uint64_t i, float scale) {
  SampleRow r;
  r.logits = normal(n_vocab, 100 + i, scale);
  r.p.seed = 5, r.p.stream = i, r.p.index = 17 * i;
  return r;
}

TEST_F(CudaSample, DrawsAsTheReference) {
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
TEST_F(CudaSample, DrawsFromFlatAndTiedLogits) {
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

TEST_F(CudaSample, DrawsFromALargeVocabulary) {
  std::vector<SampleRow> rows;
  for (uint64_t i = 0; i < 60; i++) {  // more than the scratch memory holds at once
    SampleRow r = make_row(151936, i % 4, i % 2 == 0 ? 4.0f : 0.5f);
    r.p.index = i, r.p.top_k = i % 3 == 0 ? 0 : 50, r.p.top_p = i % 2 == 0 ? 0.9f : 1.0f;
    rows.push_back(r);
  }
  check_draws("large", bf16, rows);
}

TEST_F(CudaSample, DrawsNothingFromBrokenRows) {
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

TEST_F(CudaSample, GreedyTakesTheLowestIdOnATie) {
  SampleRow r = make_row(6400, 1, 1);
  r.p.temperature = 0;
  r.logits[4000] = r.logits[123] = r.logits[6399] = 20;
  EXPECT_EQ(draw(bf16, {r}, 6400), std::vector<int32_t>{123});
}

TEST_F(CudaSample, DrawsDoNotDependOnTheBatch) {
  std::vector<SampleRow> rows;
  for (uint64_t i = 0; i < 200; i++) {
    rows.push_back(make_row(6400, i, 3));
    rows.back().p.top_k = 50, rows.back().p.top_p = 0.85f;
  }
  const std::vector<int32_t> all = draw(bf16, rows, 6400);
  for (const size_t i : {0u, 77u, 199u}) EXPECT_EQ(draw(bf16, {rows[i]}, 6400)[0], all[i]);
}

TEST_F(CudaSample, RowLogprobs) {
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

TEST_F(CudaSample, ResolveIds) {
  const Device<int32_t> ids(std::vector<int32_t>{5, -1, 0, -3, -2}), source(std::vector<int32_t>{70, 80, 90});
  cuda::resolve_ids(context(), ids, source, 5);
  EXPECT_EQ(ids.get(), (std::vector<int32_t>{5, 70, 0, 90, 80}));
}

}  // namespace
}  // namespace mm
#endif
