// y = x w^T and its backward through oneDNN: sgemm for fp32, bf16 matmul primitives (AMX or AVX-512 BF16 tiles, fp32
// sums) where asked, and our own matrix-vector product for the few rows of a decode step.
//
// Floor: 2 m n k operations; fp32 sgemm measured 570-700 GFLOP/s of about 700 on 4 Sapphire Rapids cores for the
// model's shapes, bf16 2.4-4.7 TFLOP/s with AMX. Packed weights (format tag any) were tried and lost here: the reorder
// costs what the kernel gains when weights change every step.
#include <algorithm>
#include <dnnl.hpp>
#include <map>
#include <mutex>
#include <tuple>

#include "base/cpu_features.h"
#include "base/error.h"
#include "base/thread_team.h"
#include "kernels/cpu/drivers.h"

namespace mm::cpu {

void sgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
           const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  const dnnl_status_t st =
      dnnl_sgemm(trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  MM_CHECK(st == dnnl_success, "dnnl_sgemm {}x{}x{} status {}", m, n, k, static_cast<int>(st));
}

namespace {

// bf16 operands (dense, op applied by strides), fp32 result with row distance ldc.
class Bf16Matmul {
 public:
  Bf16Matmul(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, int64_t ldc, bool accumulate) {
    using dnnl::memory;
    const memory::dims a_strides = trans_a ? memory::dims{1, m} : memory::dims{k, 1};
    const memory::dims b_strides = trans_b ? memory::dims{1, k} : memory::dims{n, 1};
    a_ = memory::desc({m, k}, memory::data_type::bf16, a_strides);
    b_ = memory::desc({k, n}, memory::data_type::bf16, b_strides);
    c_ = memory::desc({m, n}, memory::data_type::f32, memory::dims{ldc, 1});
    dnnl::primitive_attr attr;
    if (accumulate) {
      dnnl::post_ops ops;
      ops.append_sum(1.0f);
      attr.set_post_ops(ops);
    }
    // One scratchpad for all shapes: each primitive's own would add up to hundreds of megabytes over the token counts
    // of a run.
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::primitive_desc pd(dnnl::matmul::desc(a_, b_, c_), attr, engine());
    scratchpad_ = pd.scratchpad_desc();
    matmul_ = dnnl::matmul(pd);
  }
  void run(const uint16_t* a, const uint16_t* b, float* c) const {
    using dnnl::memory;
    memory ma(a_, engine(), const_cast<uint16_t*>(a)), mb(b_, engine(), const_cast<uint16_t*>(b)), mc(c_, engine(), c);
    const size_t pad = scratchpad_.get_size();
    float* pad_at = thread_scratch(2, pad / sizeof(float) + 64);
    pad_at += (128 - reinterpret_cast<uintptr_t>(pad_at) % 128) / sizeof(float);  // oneDNN wants it aligned
    memory scratch(scratchpad_, engine(), pad_at);
    static dnnl::stream stream(engine());
    matmul_.execute(stream,
                    {{DNNL_ARG_SRC, ma}, {DNNL_ARG_WEIGHTS, mb}, {DNNL_ARG_DST, mc}, {DNNL_ARG_SCRATCHPAD, scratch}});
    stream.wait();
  }

 private:
  static dnnl::engine& engine() {
    static dnnl::engine e(dnnl::engine::kind::cpu, 0);
    return e;
  }
  dnnl::memory::desc a_, b_, c_, scratchpad_;
  dnnl::matmul matmul_;
};

// oneDNN 2.6 to 2.7 dies of an illegal instruction, or gives wrong sums, in AMX products of 63 terms (oneDNN issue
// 1661; of 1 to 300 terms only 63 fails). Weights of that width take the fp32 path; token counts are padded, see
// linear_bwd.
constexpr int64_t broken_k = 63;

void bf16_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b,
               float* c, int64_t ldc, bool accumulate) {
  using Key = std::tuple<int, bool, bool, int64_t, int64_t, int64_t, int64_t, bool>;
  static std::map<Key, Bf16Matmul> cache;  // ops are issued by one thread
  const Key key{num_threads(), trans_a, trans_b, m, n, k, ldc, accumulate};
  auto it = cache.find(key);
  if (it == cache.end()) {
    if (cache.size() >= 4096) cache.clear();
    it = cache.try_emplace(key, trans_a, trans_b, m, n, k, ldc, accumulate).first;
  }
  it->second.run(a, b, c);
}

uint16_t* bf16_scratch(int slot, int64_t n) {
  return reinterpret_cast<uint16_t*>(thread_scratch(slot, static_cast<size_t>(n + 1) / 2));
}

void convert_rows(uint16_t* out, const float* x, int64_t ldx, int64_t rows, int64_t cols) {
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) simd().to_bf16(out + r * cols, x + r * ldx, cols);
  });
}

// Token counts vary from batch to batch and every shape costs a compiled primitive, so rows go in two calls: a multiple
// of 64 and the rest. Calls f(first row, rows).
template <class F>
void for_row_blocks(int64_t m, F&& f) {
  const int64_t main = m / 64 * 64;
  if (main > 0) f(int64_t{0}, main);
  if (m > main) f(main, m - main);
}

}  // namespace

void linear_fwd(float* y, int64_t ldy, const float* x, int64_t ldx, const float* w, int64_t m, int64_t n, int64_t k,
                bool accumulate, bool bf16) {
  constexpr int64_t gemv_rows = 4;
  if (m <= gemv_rows) {
    parallel_for(n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r += 16) {  // a block of weight rows stays in L1 for all m vectors
        const int64_t rows = end - r < 16 ? end - r : 16;
        for (int64_t t = 0; t < m; t++) simd().gemv(y + t * ldy + r, w + r * k, x + t * ldx, rows, k, accumulate);
      }
    });
  } else if (bf16 && k != broken_k) {
    uint16_t *xb = bf16_scratch(0, m * k), *wb = bf16_scratch(1, n * k);
    convert_rows(xb, x, ldx, m, k);
    convert_rows(wb, w, k, n, k);
    for_row_blocks(m, [&](int64_t r, int64_t rows) {
      bf16_gemm(false, true, rows, n, k, xb + r * k, wb, y + r * ldy, ldy, accumulate);
    });
  } else {
    sgemm(false, true, m, n, k, 1.0f, x, ldx, w, k, accumulate ? 1.0f : 0.0f, y, ldy);
  }
}

void linear_bwd(float* dx, int64_t lddx, float* dw, const float* dy, int64_t lddy, const float* x, int64_t ldx,
                const float* w, int64_t m, int64_t n, int64_t k, bool accumulate_dx, bool bf16) {
  if (m == 0) return;
  if (!bf16 || n == broken_k) {
    if (dx != nullptr) sgemm(false, false, m, k, n, 1.0f, dy, lddy, w, k, accumulate_dx ? 1.0f : 0.0f, dx, lddx);
    if (dw != nullptr) sgemm(true, false, n, k, m, 1.0f, dy, lddy, x, ldx, 1.0f, dw, k);
    return;
  }
  const int64_t padded = (m + 63) / 64 * 64;  // zero rows: dw needs one product for all token counts up to it
  uint16_t* dyb = bf16_scratch(0, padded * n);
  convert_rows(dyb, dy, lddy, m, n);
  if (dx != nullptr) {
    uint16_t* wb = bf16_scratch(1, n * k);
    convert_rows(wb, w, k, n, k);
    for_row_blocks(m, [&](int64_t r, int64_t rows) {
      bf16_gemm(false, false, rows, k, n, dyb + r * n, wb, dx + r * lddx, lddx, accumulate_dx);
    });
  }
  if (dw != nullptr) {
    uint16_t* xb = bf16_scratch(1, padded * k);
    convert_rows(xb, x, ldx, m, k);
    std::fill_n(dyb + m * n, (padded - m) * n, uint16_t{0});
    std::fill_n(xb + m * k, (padded - m) * k, uint16_t{0});
    bf16_gemm(true, false, n, k, padded, dyb, xb, dw, k, true);
  }
}

}  // namespace mm::cpu

namespace mm {

bool matmul_bf16_available() { return cpu_features().avx512_bf16; }

}  // namespace mm
