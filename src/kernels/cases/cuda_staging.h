// How the tests of the ops' CUDA kernels reach the GPU: a session with memory, the arrays of a call between sentinels,
// the structures of arguments with pointers to them.
#pragma once

#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/session.h"
#include "kernels/kernel_table.h"
#include "tensor/dtype.h"
#include "tensor/memory.h"

namespace mm::cases::staging {

inline constexpr DType f32 = DType::f32, bf16 = DType::bf16;

struct Gpu {
  static constexpr size_t bytes = size_t{128} << 20;
  cuda::Session session;
  char* memory = static_cast<char*>(allocate(bytes, Memory::cuda));
  Gpu() { synchronize(nullptr); }  // the zeroing is on a stream that the session's does not wait for
  ~Gpu() { release(memory, bytes, Memory::cuda); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
};

inline Gpu& gpu() {
  static Gpu g;
  return g;
}
inline const cuda::Context& context() { return gpu().session.ctx; }

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
inline int64_t extent(int64_t rows, int64_t ld, int64_t width) { return rows == 0 ? 0 : (rows - 1) * ld + width; }

// Rows that a list of row numbers reaches into.
template <class I>
int64_t rows_of(const I* list, int64_t n) {
  return n == 0 ? 0 : static_cast<int64_t>(*std::max_element(list, list + n)) + 1;
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

inline int64_t rows_of_queries(const AttentionArgs& a) { return a.cu[a.n_seq]; }

inline int64_t rows_of_keys(const AttentionArgs& a) {
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
inline cuda::Attention lists_on_gpu(Staging& s, const AttentionArgs& a) {
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

}  // namespace mm::cases::staging
#endif
