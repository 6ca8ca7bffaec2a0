// The CUDA kernels under the shared kernel tests, in fp32, and a compact test of their bf16 forms.
#ifdef MM_CUDA
#include <numeric>

#include "kernels/cases/attention_cases.h"
#include "kernels/cases/check_op.h"
#include "kernels/cases/cuda_backend.h"
#include "kernels/cases/norm_cases.h"
#include "kernels/cases/row_cases.h"
#include "kernels/cuda/session.h"
#include "kernels/ref/ref_attention.h"
#include "kernels/ref/ref_ops.h"
#include "tensor/memory.h"

namespace mm {

namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16;

struct Gpu {
  static constexpr size_t bytes = size_t{128} << 20;
  cuda::Session session;
  char* memory = static_cast<char*>(allocate(bytes, Memory::cuda));
  Gpu() { synchronize(nullptr); }  // the zeroing is on a stream that the session's does not wait for
  ~Gpu() { release(memory, bytes, Memory::cuda); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
};

Gpu& gpu() {
  static Gpu g;
  return g;
}
const cuda::Context& context() { return gpu().session.ctx; }

// The arrays of one call on the GPU. Each lies between sentinels and as far past a 16-byte boundary as on the host, so
// that cases with an offset reach the kernels for such addresses. All are copied in: what the op adds to, and the
// elements between rows, which it must leave alone.
class Staging {
 public:
  explicit Staging(std::string op) : op_(std::move(op)) {}
  template <class T>
  const T* in(const T* host, int64_t n) {
    return static_cast<const T*>(stage(const_cast<T*>(host), n, sizeof(T), false));
  }
  template <class T>
  T* out(T* host, int64_t n) {  // `host` must outlive finish()
    return static_cast<T*>(stage(host, n, sizeof(T), true));
  }
  void* scratch(size_t bytes) { return take(bytes); }
  void align() { align_ = true; }  // from here on every array begins at a multiple of 256 bytes

  // Waits for the kernels and copies the outputs back.
  void finish() {
    CUstream_st* const stream = context().stream;
    synchronize(stream);
    for (size_t i = 0; i < pieces_.size(); i++) {
      const Piece& p = pieces_[i];
      std::vector<unsigned char> got(p.image.size());
      copy_async(got.data(), p.device, got.size(), stream);
      synchronize(stream);
      for (size_t at = 0; at < got.size(); at++) {
        const bool inside = at >= p.begin && at < p.begin + p.bytes;
        if ((inside && p.host != nullptr) || got[at] == p.image[at]) continue;
        const auto byte = static_cast<int64_t>(at) - static_cast<int64_t>(p.begin);
        ADD_FAILURE() << op_ << ": array " << i << " of " << p.bytes << " bytes is written at byte " << byte
                      << (inside ? ", an input" : "");
        break;
      }
      if (p.host != nullptr && p.bytes > 0) std::memcpy(p.host, got.data() + p.begin, p.bytes);
    }
  }

 private:
  struct Piece {
    void* host;  // where it goes back to; null: an input
    char* device;
    size_t begin, bytes;  // of the array within the image
    std::vector<unsigned char> image;
  };

  char* take(size_t bytes) {
    const size_t size = (bytes + 255) / 256 * 256;
    if (used_ + size > Gpu::bytes) throw Error("the test's GPU memory is too small");
    used_ += size;
    return gpu().memory + used_ - size;
  }

  void* stage(void* host, int64_t n, size_t size, bool back) {
    if (host == nullptr) return nullptr;
    const size_t bytes = static_cast<size_t>(n) * size,
                 begin = guard + (align_ ? 0 : reinterpret_cast<uintptr_t>(host) % 16);
    Piece p{back ? host : nullptr, take(begin + bytes + guard), begin, bytes, {}};
    p.image.assign(begin + bytes + guard, sentinel);
    if (bytes > 0) std::memcpy(p.image.data() + begin, host, bytes);
    copy_async(p.device, p.image.data(), p.image.size(), context().stream);
    pieces_.push_back(std::move(p));
    return pieces_.back().device + begin;
  }

  static constexpr size_t guard = 256;
  static constexpr unsigned char sentinel = 0xff;  // NaN in every type: an element read from there shows in the result
  std::string op_;
  std::vector<Piece> pieces_;
  size_t used_ = 0;
  bool align_ = false;
};

// launches(staging) between staging and copying back. An error of one call does not end the test, except a GPU that is
// lost, whose next call throws as well.
template <class F>
void staged(const std::string& op, F&& launches) {
  (void)gpu();
  try {
    Staging s(op);
    launches(s);
    s.finish();
  } catch (const Error& e) {
    ADD_FAILURE() << op << ": " << e.what();
    synchronize(context().stream);
  }
}

// Elements of `rows` rows that lie ld apart.
int64_t extent(int64_t rows, int64_t ld, int64_t width) { return rows == 0 ? 0 : (rows - 1) * ld + width; }

// Rows that a list of row numbers reaches into.
template <class I>
int64_t rows_of(const I* list, int64_t n) {
  return n == 0 ? 0 : static_cast<int64_t>(*std::max_element(list, list + n)) + 1;
}

// --- matrix products ----------------------------------------------------------------------------------------------
// cuBLASLt proposes algorithms for matrices that begin at multiples of 256 bytes, hence align(). The bf16 form takes
// rounded operands and keeps fp32 results.
const void* operand(Staging& s, const float* x, int64_t n, bool as_bf16) {
  const float* from = s.in(x, n);
  if (!as_bf16) return from;
  void* to = s.scratch(2 * static_cast<size_t>(n));
  cuda::cast(context(), bf16, to, f32, from, n);
  return to;
}

void linear_fwd(float* y, int64_t ldy, const float* x, int64_t ldx, const float* w, int64_t m, int64_t n, int64_t k,
                bool accumulate, bool as_bf16) {
  staged("linear_fwd", [&](Staging& s) {
    s.align();
    float* d = s.out(y, extent(m, ldy, n));
    const void *a = operand(s, x, extent(m, ldx, k), as_bf16), *b = operand(s, w, n * k, as_bf16);
    gpu().session.gemm().run({.m = m,
                              .n = n,
                              .k = k,
                              .lda = ldx,
                              .ldb = k,
                              .ldd = ldy,
                              .ldc = accumulate ? ldy : 0,
                              .trans_b = true,
                              .add_c = accumulate,
                              .in = as_bf16 ? bf16 : f32,
                              .out = f32},
                             d, a, b, accumulate ? d : nullptr);
  });
}

void linear_bwd(float* dx, int64_t lddx, float* dw, const float* dy, int64_t lddy, const float* x, int64_t ldx,
                const float* w, int64_t m, int64_t n, int64_t k, bool accumulate_dx, bool as_bf16) {
  staged("linear_bwd", [&](Staging& s) {
    s.align();
    const DType in = as_bf16 ? bf16 : f32;
    const void* g = operand(s, dy, extent(m, lddy, n), as_bf16);
    cuda::Gemm& gemm = gpu().session.gemm();
    if (dx != nullptr) {
      float* d = s.out(dx, extent(m, lddx, k));
      gemm.run({.m = m,
                .n = k,
                .k = n,
                .lda = lddy,
                .ldb = k,
                .ldd = lddx,
                .ldc = accumulate_dx ? lddx : 0,
                .add_c = accumulate_dx,
                .in = in,
                .out = f32},
               d, g, operand(s, w, n * k, as_bf16), accumulate_dx ? d : nullptr);
    }
    if (dw != nullptr && m > 0) {  // cuBLASLt has no products over nothing; no model asks for one
      float* d = s.out(dw, n * k);
      gemm.run({.m = n,
                .n = k,
                .k = m,
                .lda = lddy,
                .ldb = ldx,
                .ldd = k,
                .ldc = k,
                .trans_a = true,
                .add_c = true,
                .in = in,
                .out = f32},
               d, g, operand(s, x, extent(m, ldx, k), as_bf16), d);
    }
  });
}

// --- rows ---------------------------------------------------------------------------------------------------------
void embed_fwd(float* out, const float* table, const int32_t* ids, int64_t n, int64_t d) {
  staged("embed_fwd", [&](Staging& s) {
    cuda::embed_fwd(context(), f32, s.out(out, n * d), s.in(table, rows_of(ids, n) * d), s.in(ids, n), n, d);
  });
}

void embed_bwd(float* dtable, const float* dout, const int32_t* ids, int64_t n, int64_t d) {
  staged("embed_bwd", [&](Staging& s) {
    const int64_t rows = rows_of(ids, n);
    cuda::embed_bwd(context(), f32, s.out(dtable, rows * d), s.in(dout, n * d), s.in(ids, n), n, d, rows);
  });
}

void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d) {
  staged("rmsnorm_fwd", [&](Staging& s) {
    cuda::rmsnorm_fwd(context(), f32, s.out(y, n * d), s.out(rstd, n), s.in(x, n * d), s.in(w, d), eps, n, d);
  });
}

void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d) {
  staged("rmsnorm_bwd", [&](Staging& s) {
    cuda::rmsnorm_bwd(context(), f32, s.out(dx, n * d), s.out(dw, d), s.in(dy, n * d), s.in(x, n * d), s.in(rstd, n),
                      s.in(w, d), n, d);
  });
}

// T: the type of the norm's weights.
template <class T>
cuda::NormRope on_gpu(Staging& s, const NormRopeArgs& a, const T* q_weight, const T* k_weight) {
  const int64_t table = rows_of(a.positions, a.n) * (a.d_head / 2);
  return {.q_weight = s.in(q_weight, a.d_head),
          .k_weight = s.in(k_weight, a.d_head),
          .cos = s.in(a.cos, table),
          .sin = s.in(a.sin, table),
          .positions = s.in(a.positions, a.n),
          .eps = a.eps,
          .n = a.n,
          .n_head = a.n_head,
          .n_kv_head = a.n_kv_head,
          .d_head = a.d_head};
}

int64_t qkv_size(const NormRopeArgs& a) { return a.n * (a.n_head + 2 * a.n_kv_head) * a.d_head; }

void qk_norm_rope_fwd(float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots,
                      const float* qkv, const NormRopeArgs& a) {
  staged("qk_norm_rope_fwd", [&](Staging& s) {
    const int64_t rows = slots != nullptr ? rows_of(slots, a.n) : a.n, width = int64_t{a.n_kv_head} * a.d_head;
    float* q = s.out(q_out, a.n * a.n_head * a.d_head);
    float* k = s.out(k_out, extent(rows, ldk, width));
    float* v = s.out(v_out, extent(rows, ldv, width));
    const int64_t* rows_to = s.in(slots, a.n);
    const float* x = s.in(qkv, qkv_size(a));
    cuda::qk_norm_rope_fwd(context(), f32, q, k, ldk, v, ldv, rows_to, x, on_gpu(s, a, a.q_weight, a.k_weight));
  });
}

void qk_norm_rope_bwd(float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a) {
  staged("qk_norm_rope_bwd", [&](Staging& s) {
    float *d = s.out(dqkv, qkv_size(a)), *dq = s.out(dq_weight, a.d_head), *dk = s.out(dk_weight, a.d_head);
    const float* x = s.in(qkv, qkv_size(a));
    cuda::qk_norm_rope_bwd(context(), f32, d, dq, dk, x, on_gpu(s, a, a.q_weight, a.k_weight));
  });
}

void swiglu_fwd(float* act, const float* gate_up, int64_t n, int64_t f) {
  staged("swiglu_fwd",
         [&](Staging& s) { cuda::swiglu_fwd(context(), f32, s.out(act, n * f), s.in(gate_up, n * 2 * f), n, f); });
}

void swiglu_bwd(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f) {
  staged("swiglu_bwd", [&](Staging& s) {
    float* d = s.out(dgate_up, n * 2 * f);
    const float* x = gate_up == dgate_up ? d : s.in(gate_up, n * 2 * f);
    cuda::swiglu_bwd(context(), f32, d, nullptr, s.in(dact, n * f), x, n, f);
  });
}

void logprob_fwd(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v) {
  staged("logprob_fwd", [&](Staging& s) {
    cuda::logprob_fwd(context(), f32, s.out(logp, n), s.out(lse, n), s.in(logits, n * v), s.in(targets, n), n, v);
  });
}

void logprob_bwd(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v) {
  staged("logprob_bwd", [&](Staging& s) {
    cuda::logprob_bwd(context(), f32, s.out(logits, n * v), s.in(lse, n), s.in(g, n), s.in(targets, n), n, v);
  });
}

void gather_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  staged("gather_rows", [&](Staging& s) {
    cuda::gather_rows(context(), f32, s.out(out, n * d), s.in(x, rows_of(rows, n) * d), s.in(rows, n), n, d);
  });
}

void scatter_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d) {
  staged("scatter_rows", [&](Staging& s) {
    cuda::scatter_rows(context(), f32, s.out(out, rows_of(rows, n) * d), s.in(x, n * d), s.in(rows, n), n, d);
  });
}

// --- attention ----------------------------------------------------------------------------------------------------
int64_t rows_of_queries(const AttentionArgs& a) { return a.cu[a.n_seq]; }

int64_t rows_of_keys(const AttentionArgs& a) {
  int64_t rows = a.kv_start == nullptr ? rows_of_queries(a) : 0;
  for (int64_t i = 0; a.kv_start != nullptr && i < a.n_seq; i++)
    rows = std::max<int64_t>(rows, a.kv_start[i] + a.kv_len[i]);
  return rows;
}

struct AttentionExtents {
  int64_t q, k, v, out, lse;
  explicit AttentionExtents(const AttentionArgs& a) {
    const int64_t n = rows_of_queries(a), n_kv = rows_of_keys(a), width = int64_t{a.n_head} * a.d_head,
                  kv_width = int64_t{a.n_kv_head} * a.d_head;
    q = extent(n, a.ldq, width), out = extent(n, a.ldo, width), lse = n * a.n_head;
    k = extent(n_kv, a.ldk, kv_width), v = extent(n_kv, a.ldv, kv_width);
  }
};

// All but the arrays of elements: the lists, the work list that the trainer and the engine build, the numbers.
cuda::Attention lists_on_gpu(Staging& s, const AttentionArgs& a) {
  constexpr int32_t tile_rows = 128;
  constexpr size_t spare = 3;  // the grid may be larger than the list
  const auto length = [&](int32_t i) { return a.cu[i + 1] - a.cu[i]; };
  std::vector<int32_t> order(static_cast<size_t>(a.n_seq)), tiles;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return length(x) > length(y); });
  for (const int32_t i : order) {
    for (int32_t row = (length(i) + tile_rows - 1) / tile_rows * tile_rows - tile_rows; row >= 0; row -= tile_rows)
      tiles.insert(tiles.end(), {i, row});
  }
  const auto n_tiles = static_cast<int32_t>(tiles.size() / 2);
  tiles.resize(tiles.size() + 2 * spare);
  cuda::Attention r;
  r.ldq = a.ldq, r.ldk = a.ldk, r.ldv = a.ldv, r.ldo = a.ldo;
  r.cu = s.in(a.cu, a.n_seq + 1);
  r.kv_start = s.in(a.kv_start, a.n_seq);
  r.kv_len = s.in(a.kv_len, a.n_seq);
  r.n_seq = a.n_seq;
  r.n_tok = rows_of_queries(a);
  r.tiles = s.in(tiles.data(), static_cast<int64_t>(tiles.size()));
  r.n_tiles = s.in(&n_tiles, 1);
  r.max_tiles = static_cast<int64_t>(tiles.size() / 2);
  r.n_head = a.n_head, r.n_kv_head = a.n_kv_head, r.d_head = a.d_head;
  r.scale = a.scale, r.dropout = a.dropout, r.seed = a.seed, r.stream = a.stream;
  return r;
}

void attention_fwd(const AttentionArgs& a) {
  staged("attention_fwd", [&](Staging& s) {
    const AttentionExtents e(a);
    cuda::Attention r = lists_on_gpu(s, a);
    r.q = s.in(a.q, e.q), r.k = s.in(a.k, e.k), r.v = s.in(a.v, e.v);
    r.out = s.out(a.out, e.out), r.lse = s.out(a.lse, e.lse);
    cuda::attention_fwd(context(), f32, r);
  });
}

// out and lse are inputs here, though the structure of forward holds them as pointers to write to.
template <class T>
cuda::AttentionBwd bwd_on_gpu(Staging& s, const AttentionBwdArgs& b, const T* q, const T* k, const T* v, const T* out,
                              const T* dout) {
  const AttentionArgs& a = b.fwd;
  const AttentionExtents e(a);
  cuda::AttentionBwd r;
  r.fwd = lists_on_gpu(s, a);
  r.fwd.q = s.in(q, e.q), r.fwd.k = s.in(k, e.k), r.fwd.v = s.in(v, e.v);
  r.fwd.out = const_cast<T*>(s.in(out, e.out)), r.fwd.lse = const_cast<float*>(s.in(a.lse, e.lse));
  r.dout = s.in(dout, extent(rows_of_queries(a), b.lddout, int64_t{a.n_head} * a.d_head));
  r.lddout = b.lddout, r.lddq = b.lddq, r.lddk = b.lddk, r.lddv = b.lddv;
  return r;
}

void attention_bwd(const AttentionBwdArgs& b) {
  staged("attention_bwd", [&](Staging& s) {
    const AttentionArgs& a = b.fwd;
    const int64_t n = rows_of_queries(a), width = int64_t{a.n_head} * a.d_head,
                  kv_width = int64_t{a.n_kv_head} * a.d_head;
    cuda::AttentionBwd r = bwd_on_gpu(s, b, a.q, a.k, a.v, a.out, b.dout);
    r.dq = s.out(b.dq, extent(n, b.lddq, width));
    r.dk = s.out(b.dk, extent(n, b.lddk, kv_width));
    r.dv = s.out(b.dv, extent(n, b.lddv, kv_width));
    cuda::attention_bwd(context(), f32, r);
  });
}

// --- mixture of experts -------------------------------------------------------------------------------------------
void moe_route_fwd(float* scores, int32_t* experts, float* weights, const float* logits, int64_t n, int n_expert,
                   int top_k, bool norm) {
  staged("moe_route_fwd", [&](Staging& s) {
    cuda::moe_route_fwd(context(), f32, s.out(scores, n * n_expert), s.out(experts, n * top_k),
                        s.out(weights, n * top_k), s.in(logits, n * n_expert), n, n_expert, top_k, norm);
  });
}

void moe_route_bwd(float* dlogits, const float* dweights, const float* daux, const float* scores,
                   const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm) {
  staged("moe_route_bwd", [&](Staging& s) {
    cuda::moe_route_bwd(context(), f32, s.out(dlogits, n * n_expert), s.in(dweights, n * top_k), s.in(daux, n_expert),
                        s.in(scores, n * n_expert), s.in(experts, n * top_k), n, n_expert, top_k, norm);
  });
}

void moe_combine_fwd(float* out, const float* y, const int32_t* slot, const float* weights, int64_t n, int top_k,
                     int64_t d) {
  staged("moe_combine_fwd", [&](Staging& s) {
    const int64_t pairs = n * top_k;
    cuda::moe_combine_fwd(context(), f32, s.out(out, n * d), s.in(y, rows_of(slot, pairs) * d), s.in(slot, pairs),
                          s.in(weights, pairs), n, top_k, d);
  });
}

void moe_combine_bwd(float* dy, float* dweights, const float* dout, const float* y, const int32_t* slot,
                     const float* weights, int64_t n, int top_k, int64_t d) {
  staged("moe_combine_bwd", [&](Staging& s) {
    const int64_t pairs = n * top_k, size = rows_of(slot, pairs) * d;
    cuda::moe_combine_bwd(context(), f32, s.out(dy, size), s.out(dweights, pairs), s.in(dout, n * d), s.in(y, size),
                          s.in(slot, pairs), s.in(weights, pairs), n, top_k, d);
  });
}

void scatter_add(float* out, const float* x, const int32_t* slot, int64_t n, int top_k, int64_t d) {
  staged("scatter_add", [&](Staging& s) {
    const int64_t pairs = n * top_k;
    cuda::scatter_add(context(), f32, s.out(out, n * d), s.in(x, rows_of(slot, pairs) * d), s.in(slot, pairs), n, top_k,
                      d);
  });
}

// --- vectors ------------------------------------------------------------------------------------------------------
void dropout(float* x, float p, uint64_t seed, uint64_t stream, int64_t n) {
  staged("dropout", [&](Staging& s) { cuda::dropout(context(), f32, s.out(x, n), p, seed, stream, n); });
}

void add(float* y, const float* x, int64_t n) {
  staged("add", [&](Staging& s) { cuda::add(context(), f32, s.out(y, n), s.in(x, n), n); });
}

void copy(float* y, const float* x, int64_t n) {
  staged("copy", [&](Staging& s) { cuda::copy(context(), f32, s.out(y, n), s.in(x, n), n); });
}

void zero(float* x, int64_t n) {
  staged("zero", [&](Staging& s) { cuda::zero(context(), s.out(x, n), static_cast<size_t>(n) * sizeof(float)); });
}

double sum_sq(const float* x, int64_t n) {
  double sum = -1;
  staged("sum_sq", [&](Staging& s) { cuda::sum_sq(context(), s.out(&sum, 1), s.in(x, n), n); });
  return sum;
}

// The gradients' scale as the clipping that comes to it: max_norm / (norm + 1e-6), for scales up to 1.
void adamw(float* p, const float* g, float* m, float* v, const AdamWArgs& a, int64_t n) {
  cuda::AdamWState state{.lr = static_cast<float>(a.lr),
                         .max_norm = a.grad_scale,
                         .inv_scale = 1.0f,
                         .sum_sq = (1 - 1e-6) * (1 - 1e-6),
                         .update_count = static_cast<int32_t>(a.step - 1)};
  staged("adamw", [&](Staging& s) {
    float* to = s.out(p, n);
    const float* from = s.in(g, n);
    float *first = s.out(m, n), *second = s.out(v, n);
    cuda::adamw(context(), f32, nullptr, to, from, first, second, s.out(&state, 1),
                {.beta1 = a.beta1, .beta2 = a.beta2, .eps = a.eps, .weight_decay = a.weight_decay}, n);
  });
  EXPECT_EQ(state.update_count, a.step) << "adamw";
}

}  // namespace

const KernelTable* cases::cuda_kernels() {
  static const KernelTable table{.linear_fwd = linear_fwd,
                                 .linear_bwd = linear_bwd,
                                 .embed_fwd = embed_fwd,
                                 .embed_bwd = embed_bwd,
                                 .rmsnorm_fwd = rmsnorm_fwd,
                                 .rmsnorm_bwd = rmsnorm_bwd,
                                 .qk_norm_rope_fwd = qk_norm_rope_fwd,
                                 .qk_norm_rope_bwd = qk_norm_rope_bwd,
                                 .attention_fwd = attention_fwd,
                                 .attention_bwd = attention_bwd,
                                 .swiglu_fwd = swiglu_fwd,
                                 .swiglu_bwd = swiglu_bwd,
                                 .logprob_fwd = logprob_fwd,
                                 .logprob_bwd = logprob_bwd,
                                 .dropout = dropout,
                                 .add = add,
                                 .moe_route_fwd = moe_route_fwd,
                                 .moe_route_bwd = moe_route_bwd,
                                 .gather_rows = gather_rows,
                                 .scatter_rows = scatter_rows,
                                 .moe_combine_fwd = moe_combine_fwd,
                                 .moe_combine_bwd = moe_combine_bwd,
                                 .scatter_add = scatter_add,
                                 .adamw = adamw,
                                 .copy = copy,
                                 .zero = zero,
                                 .sum_sq = sum_sq};
  return cuda_status().usable ? &table : nullptr;
}

// --- bf16 ---------------------------------------------------------------------------------------------------------
namespace {

using cases::AttentionCase, cases::Input, cases::LogprobCase, cases::NormRopeCase, cases::RmsnormCase,
    cases::SwigluCase;

constexpr float eps = 1e-6f;

// N(0, 1) numbers rounded to bf16, as bf16, float and double.
struct Half {
  Input x;
  std::vector<uint16_t> bits;
  int skip;
  Half(int64_t n, uint64_t stream, int offset, float scale = 1.0f)
      : x(n, stream, offset, scale), bits(static_cast<size_t>(n + offset) + 1), skip(offset) {
    for (int64_t i = 0; i < n; i++) set(i, x.f()[i]);
  }
  void set(int64_t i, float value) {
    const uint16_t h = float_to_bf16(value);
    bits[static_cast<size_t>(i + skip)] = h;
    x.set(i, bf16_to_float(h));
  }
  template <class T>
  const T* get() const {
    return x.get<T>();
  }
  const uint16_t* h() const { return bits.data() + skip; }
};

struct HalfOutput {
  const char* name;
  std::vector<float> init;
  bool fp32 = false;  // statistics and gradients of weights
};

HalfOutput set_half(const char* name, int64_t n, bool fp32 = false) {
  return {name, std::vector<float>(static_cast<size_t>(n), cases::fill()), fp32};
}
HalfOutput added_half(const char* name, int64_t n, uint64_t stream, bool fp32 = false) {
  const Input x(n, stream);
  return {name, {x.f(), x.f() + n}, fp32};
}

void round_all(std::vector<float>& v) {
  for (float& x : v) x = bf16_to_float(float_to_bf16(x));
}

// At most twice the error of the plain fp32 run whose results are rounded to bf16, plus one rounding of the largest
// element; fp32 outputs have rounded inputs alone, so theirs is an error of fp32 arithmetic with fast exponentials.
void expect_near(const HalfOutput& o, const std::vector<float>& got, const std::vector<float>& plain,
                 const std::vector<double>& exact) {
  double err = 0, err_plain = 0, largest = 0;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); i++) {
    if (std::isnan(exact[i])) {
      ASSERT_TRUE(cases::same_bits(got[i], o.init[i])) << o.name << "[" << i << "] is not the op's to write";
      continue;
    }
    const double e = std::abs(got[i] - exact[i]);
    ASSERT_TRUE(std::isfinite(e)) << o.name << "[" << i << "] is " << got[i] << ", exact " << exact[i];
    if (e > err) err = e, at = i;
    err_plain = std::max(err_plain, std::abs(plain[i] - exact[i]));
    largest = std::max(largest, std::abs(exact[i]));
  }
  // rounding(16): a gradient that is exactly zero is a difference of two fp32 sums there.
  const double floor = o.fp32 ? 0x1p-14 * largest + cases::rounding(1) : 0x1p-8 * largest + cases::rounding(16);
  EXPECT_LE(err, 2 * err_plain + floor) << o.name << "[" << at << "] is " << got[at] << ", exact " << exact[at]
                                        << ", plain is off by " << err_plain;
}

// spec(T** out) as in check_op; run(context, staging, out) launches on device pointers. On a newer GPU the kernels for
// sm_80 run as well.
template <class Spec, class Run>
void check_bf16(const std::string& name, int offset, std::vector<HalfOutput> outputs, Spec&& spec, Run&& run) {
  std::vector<std::vector<double>> exact;
  std::vector<std::vector<float>> plain;
  for (HalfOutput& o : outputs) {
    if (!o.fp32) round_all(o.init);
    exact.emplace_back(o.init.begin(), o.init.end()).push_back(0.0);
    plain.emplace_back(o.init).push_back(0.0f);
  }
  std::vector<double*> exact_ptr;
  std::vector<float*> plain_ptr;
  for (auto& v : exact) exact_ptr.push_back(v.data());
  for (auto& v : plain) plain_ptr.push_back(v.data());
  spec(exact_ptr.data());
  spec(plain_ptr.data());
  for (size_t i = 0; i < outputs.size(); i++) {
    if (!outputs[i].fp32) round_all(plain[i]);
  }
  cuda::Context ctx = context();
  for (const int arch : {ctx.arch, 80}) {
    if (arch == 80 && ctx.arch == 80) continue;
    ctx.arch = arch;
    SCOPED_TRACE(fmt::format("{} as on sm_{}", name, arch));
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<uint16_t>> halves;
    const auto skip = static_cast<size_t>(offset);
    for (const HalfOutput& o : outputs) {
      floats.emplace_back(o.init).push_back(0.0f);
      halves.emplace_back(skip, uint16_t{0});
      for (const float x : floats.back()) halves.back().push_back(float_to_bf16(x));
    }
    staged(name, [&](Staging& s) {
      std::vector<void*> out;
      for (size_t i = 0; i < outputs.size(); i++) {
        const auto n = static_cast<int64_t>(outputs[i].init.size());
        if (outputs[i].fp32) out.push_back(s.out(floats[i].data(), n));
        else out.push_back(s.out(halves[i].data() + skip, n));
      }
      run(std::as_const(ctx), s, out.data());
    });
    for (size_t i = 0; i < outputs.size(); i++) {
      floats[i].pop_back();
      for (size_t j = 0; j < floats[i].size() && !outputs[i].fp32; j++)
        floats[i][j] = bf16_to_float(halves[i][skip + j]);
      expect_near(outputs[i], floats[i], plain[i], exact[i]);
    }
  }
}

class CudaBf16 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  }
};

template <class Case, size_t n>
std::vector<Case> with_more(const Case (&cases)[n], std::initializer_list<Case> more) {
  std::vector<Case> all(cases, cases + n);
  all.insert(all.end(), more);
  return all;
}

}  // namespace

TEST_F(CudaBf16, Rmsnorm) {
  for (const RmsnormCase& c : with_more(cases::rmsnorm_cases, {{700, 768}, {5, 4096}, {3, 20000}})) {
    const int64_t size = c.n * c.d;
    const Half x(size, 1, c.offset, c.scale), w(c.d, 2, c.offset), dy(size, 3, c.offset);
    check_bf16(
        "rmsnorm_fwd " + c.name(), c.offset, {set_half("y", size), set_half("rstd", c.n, true)},
        [&]<class T>(T** out) { ref::rmsnorm_fwd<T, T>(out[0], out[1], x.get<T>(), w.get<T>(), eps, c.n, c.d); },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::rmsnorm_fwd(ctx, bf16, out[0], static_cast<float*>(out[1]), s.in(x.h(), size), s.in(w.h(), c.d), eps,
                            c.n, c.d);
        });
    Input rstd(c.n, 4);
    for (int64_t t = 0; t < c.n; t++)
      rstd.set(t, static_cast<float>(ref::inv_rms<double>(x.get<double>() + t * c.d, c.d, eps)));
    check_bf16(
        "rmsnorm_bwd " + c.name(), c.offset, {added_half("dx", size, 5), added_half("dw", c.d, 6, true)},
        [&]<class T>(T** out) {
          ref::rmsnorm_bwd<T, T>(out[0], out[1], dy.get<T>(), x.get<T>(), rstd.get<T>(), w.get<T>(), c.n, c.d);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::rmsnorm_bwd(ctx, bf16, out[0], static_cast<float*>(out[1]), s.in(dy.h(), size), s.in(x.h(), size),
                            s.in(rstd.f(), c.n), s.in(w.h(), c.d), c.n, c.d);
        });
  }
}

TEST_F(CudaBf16, QkNormRope) {
  constexpr int max_pos = 97;
  for (const NormRopeCase& c : cases::norm_rope_cases) {
    const int64_t half = c.d_head / 2, size = c.n * (c.n_head + 2 * c.n_kv_head) * c.d_head,
                  rows = c.slots ? 2 * c.n : c.n, width = int64_t{c.n_kv_head} * c.d_head, ld = width + c.pad;
    const Half qkv(size, 1, c.offset), wq(c.d_head, 2, c.offset), wk(c.d_head, 3, c.offset);
    Input cos(max_pos * half, 4), sin(max_pos * half, 5);
    for (int64_t i = 0; i < max_pos * half; i++) {
      cos.set(i, static_cast<float>(std::cos(37.0 * static_cast<double>(i % 1013))));
      sin.set(i, static_cast<float>(std::sin(37.0 * static_cast<double>(i % 1013))));
    }
    std::vector<int32_t> positions(static_cast<size_t>(c.n) + 1);
    std::vector<int64_t> slots(positions.size());
    for (int64_t t = 0; t < c.n; t++) {
      positions[static_cast<size_t>(t)] = static_cast<int32_t>(t * 31 % max_pos);
      slots[static_cast<size_t>(t)] = 2 * (c.n - 1 - t) + 1;
    }
    const int64_t* const slot = c.slots ? slots.data() : nullptr;
    const NormRopeArgs args{.cos = cos.f(),
                            .sin = sin.f(),
                            .positions = positions.data(),
                            .eps = eps,
                            .n = c.n,
                            .n_head = c.n_head,
                            .n_kv_head = c.n_kv_head,
                            .d_head = c.d_head};
    const auto on_device = [&](Staging& s) {
      return on_gpu(s, args, c.norm ? wq.h() : nullptr, c.norm ? wk.h() : nullptr);
    };
    check_bf16(
        "qk_norm_rope_fwd " + c.name(), c.offset,
        {set_half("q", c.n * c.n_head * c.d_head), set_half("k", extent(rows, ld, width)),
         set_half("v", extent(rows, ld, width))},
        [&]<class T>(T** out) {
          ref::qk_norm_rope_fwd<T, T>(out[0], out[1], ld, out[2], ld, slot, qkv.get<T>(),
                                      c.norm ? wq.get<T>() : nullptr, c.norm ? wk.get<T>() : nullptr, args);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::qk_norm_rope_fwd(ctx, bf16, out[0], out[1], ld, out[2], ld, s.in(slot, c.n), s.in(qkv.h(), size),
                                 on_device(s));
        });
    std::vector<HalfOutput> outputs{added_half("dqkv", size, 6)};
    if (c.norm) outputs.push_back(added_half("dq_weight", c.d_head, 7, true));
    if (c.norm) outputs.push_back(added_half("dk_weight", c.d_head, 8, true));
    check_bf16(
        "qk_norm_rope_bwd " + c.name(), c.offset, outputs,
        [&]<class T>(T** out) {
          ref::qk_norm_rope_bwd<T, T>(out[0], c.norm ? out[1] : nullptr, c.norm ? out[2] : nullptr, qkv.get<T>(),
                                      c.norm ? wq.get<T>() : nullptr, c.norm ? wk.get<T>() : nullptr, args);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          auto *dq = static_cast<float*>(c.norm ? out[1] : nullptr),
               *dk = static_cast<float*>(c.norm ? out[2] : nullptr);
          cuda::qk_norm_rope_bwd(ctx, bf16, out[0], dq, dk, s.in(qkv.h(), size), on_device(s));
        });
  }
}

TEST_F(CudaBf16, Swiglu) {
  for (const SwigluCase& c : cases::swiglu_cases) {
    const int64_t size = c.n * c.f;
    const Half gate_up(2 * size, 1, c.offset, c.scale), dact(size, 2, c.offset);
    const auto forward = [&]<class T>(T* act) { ref::swiglu_fwd<T, T>(act, gate_up.get<T>(), c.n, c.f); };
    check_bf16(
        "swiglu_fwd " + c.name(), c.offset, {set_half("act", size)}, [&]<class T>(T** out) { forward(out[0]); },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::swiglu_fwd(ctx, bf16, out[0], s.in(gate_up.h(), 2 * size), c.n, c.f);
        });
    check_bf16(
        "swiglu_bwd " + c.name(), c.offset, {set_half("dgate_up", 2 * size), set_half("act", size)},
        [&]<class T>(T** out) {
          ref::swiglu_bwd<T, T>(out[0], dact.get<T>(), gate_up.get<T>(), c.n, c.f);
          forward(out[1]);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::swiglu_bwd(ctx, bf16, out[0], out[1], s.in(dact.h(), size), s.in(gate_up.h(), 2 * size), c.n, c.f);
        });
  }
}

TEST_F(CudaBf16, LogprobFwdBwd) {
  for (const LogprobCase& c : with_more(cases::logprob_cases, {{300, 6400}, {3, 32000}, {2, 40000}})) {
    Half logits(c.n * c.v, 1, c.offset, c.scale);
    const Input g(c.n, 2);
    std::vector<int32_t> targets(static_cast<size_t>(c.n) + 1);
    for (int64_t t = 0; t < c.n; t++) {
      targets[static_cast<size_t>(t)] = static_cast<int32_t>(t * 7919 % c.v);
      for (int64_t i = t * c.v; c.sure && i < (t + 1) * c.v; i++) logits.set(i, logits.get<float>()[i] + 64.0f);
      if (c.sure) logits.set(t * c.v + targets[static_cast<size_t>(t)], 69.1f + 5.7f * c.scale);
    }
    HalfOutput in_place = set_half("dlogits", c.n * c.v);
    std::copy_n(logits.get<float>(), in_place.init.size(), in_place.init.begin());
    check_bf16(
        "logprob_fwd_bwd " + c.name(), c.offset, {in_place, set_half("logp", c.n, true), set_half("lse", c.n, true)},
        [&]<class T>(T** out) {
          ref::logprob_fwd<T, T>(out[1], out[2], out[0], targets.data(), c.n, c.v);
          ref::logprob_bwd<T, T>(out[0], out[2], g.get<T>(), targets.data(), c.n, c.v);
        },
        [&](const cuda::Context& ctx, Staging& s, void** out) {
          cuda::logprob_fwd_bwd(ctx, bf16, out[0], static_cast<float*>(out[1]), static_cast<float*>(out[2]),
                                s.in(g.f(), c.n), s.in(targets.data(), c.n), c.n, c.v);
        });
  }
}

namespace {

// As in attention_test.cpp.
struct HalfAttention {
  int64_t n, n_kv, ldq, ldkv;
  Half q, k, v;
  std::vector<int32_t> cu{0}, kv_start, kv_len;
  AttentionArgs args;

  explicit HalfAttention(const AttentionCase& c)
      : n(c.n()),
        n_kv(std::accumulate(c.past.begin(), c.past.end(), n + static_cast<int64_t>(c.past.size()))),
        ldq(c.n_head * c.d_head + c.pad),
        ldkv(c.n_kv_head * c.d_head + c.pad),
        q(n * ldq, 1, c.offset),
        k(n_kv * ldkv, 2, c.offset),
        v(n_kv * ldkv, 3, c.offset) {
    int64_t end = n_kv;
    for (size_t i = 0; i < c.q_len.size(); i++) {
      cu.push_back(cu.back() + c.q_len[i]);
      if (c.past.empty()) continue;
      kv_len.push_back(c.past[i] + c.q_len[i]);
      end -= kv_len.back() + 1;
      kv_start.push_back(static_cast<int32_t>(end));
    }
    args.ldq = args.ldo = ldq, args.ldk = args.ldv = ldkv;
    args.cu = cu.data();
    args.kv_start = c.past.empty() ? nullptr : kv_start.data();
    args.kv_len = c.past.empty() ? nullptr : kv_len.data();
    args.n_seq = static_cast<int64_t>(c.q_len.size());
    args.n_head = c.n_head, args.n_kv_head = c.n_kv_head, args.d_head = c.d_head;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.d_head));
  }
};

// Every width on several tiles of 128 rows, beside those of the table.
std::vector<AttentionCase> half_cases() {
  std::vector<AttentionCase> all;
  for (const AttentionCase& c : cases::attention_cases) {
    if (c.dropout == 0 && c.d_head % 32 == 0) all.push_back(c);
  }
  for (const int d : {32, 64, 96, 128}) all.push_back({{200, 129, 3, 0, 300}, {}, 4, 2, d});
  return all;
}

void check_half_fwd(const AttentionCase& c) {
  const HalfAttention in(c);
  const AttentionExtents e(in.args);
  std::vector<HalfOutput> outputs{set_half("out", e.out)};
  if (c.lse) outputs.push_back(set_half("lse", e.lse, true));
  check_bf16(
      "attention_fwd " + c.name(), c.offset, outputs,
      [&]<class T>(T** out) {
        ref::attention_fwd<T, T>(in.args, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), out[0],
                                 c.lse ? out[1] : nullptr);
      },
      [&](const cuda::Context& ctx, Staging& s, void** out) {
        cuda::Attention a = lists_on_gpu(s, in.args);
        a.q = s.in(in.q.h(), e.q), a.k = s.in(in.k.h(), e.k), a.v = s.in(in.v.h(), e.v);
        a.out = out[0], a.lse = static_cast<float*>(c.lse ? out[1] : nullptr);
        cuda::attention_fwd(ctx, bf16, a);
      });
}

}  // namespace

TEST_F(CudaBf16, AttentionForward) {
  for (const AttentionCase& c : half_cases()) check_half_fwd(c);
}

TEST_F(CudaBf16, AttentionForwardWithEarlierKeys) {
  for (const AttentionCase& c : with_more(cases::kv_cache_cases, {{{130, 1}, {70, 500}, 8, 2, 64}})) {
    if (c.dropout == 0) check_half_fwd(c);
  }
}

TEST_F(CudaBf16, AttentionBackward) {
  for (const AttentionCase& c : half_cases()) {
    HalfAttention in(c);
    const AttentionExtents e(in.args);
    const Half dout(in.n * in.ldq, 4, c.offset);
    Half out(in.n * in.ldq, 5, c.offset);  // what forward leaves
    std::vector<float> o(out.get<float>(), out.get<float>() + in.n * in.ldq), lse(static_cast<size_t>(e.lse) + 1);
    ref::attention_fwd<float>(in.args, in.q.get<float>(), in.k.get<float>(), in.v.get<float>(), o.data(), lse.data());
    for (size_t i = 0; i < o.size(); i++) out.set(static_cast<int64_t>(i), o[i]);
    in.args.lse = lse.data();
    const AttentionBwdArgs b{.fwd = in.args, .lddout = in.ldq, .lddq = in.ldq, .lddk = in.ldkv, .lddv = in.ldkv};
    check_bf16(
        "attention_bwd " + c.name(), c.offset, {set_half("dq", e.q), set_half("dk", e.k), set_half("dv", e.v)},
        [&]<class T>(T** d) {
          for (int64_t r = 0; r < in.n; r++) {
            std::fill_n(d[0] + r * in.ldq, c.n_head * c.d_head, T{0});
            std::fill_n(d[1] + r * in.ldkv, c.n_kv_head * c.d_head, T{0});
            std::fill_n(d[2] + r * in.ldkv, c.n_kv_head * c.d_head, T{0});
          }
          ref::attention_bwd<T, T>(b, in.q.get<T>(), in.k.get<T>(), in.v.get<T>(), dout.get<T>(), d[0], d[1], d[2]);
        },
        [&](const cuda::Context& ctx, Staging& s, void** d) {
          cuda::AttentionBwd a = bwd_on_gpu(s, b, in.q.h(), in.k.h(), in.v.h(), out.h(), dout.h());
          a.dq = d[0], a.dk = d[1], a.dv = d[2];
          cuda::attention_bwd(ctx, bf16, a);
        });
  }
}

using CudaBackend = cases::KernelTest;

// Says so when the tests above and those over cpu_backends() ran without a GPU.
TEST_F(CudaBackend, IsAmongTheBackends) {
  if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  for (const auto* list : {&cases::cpu_backends(), &cases::cpu_and_row_backends()})
    EXPECT_TRUE(std::any_of(list->begin(), list->end(), [](const auto& b) { return b.name == "cuda"; }));
}

}  // namespace mm
#endif
