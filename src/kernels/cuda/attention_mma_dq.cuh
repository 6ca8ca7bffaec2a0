// dq of attention on tensor cores, see attention_mma_bwd.cu. Two kernels: one head a block, its q and dout read from
// shared memory at each use (wide heads); or several heads a block one after another, q and dout in registers, so that
// the rows of the next head come in while the last keys of this one are worked on (narrow heads, where the latencies of
// a start would be a third of the time).
#pragma once

#include "kernels/cuda/attention_mma.cuh"

namespace mm::cuda {

struct Stats {
  float lse2, delta;
};

// kBlock keys a stage, kStep at a time in registers.
template <class T_, int D_, int kWarps_, int kBlock_, int kStep_, bool kKeepQ_, bool kKeepDout_, int kBlocksPerSm_>
struct QueryShape {
  using T = T_;
  static constexpr int D = D_, warps = kWarps_, block = kBlock_, step = kStep_, MT = tile_rows / (16 * warps);
  static constexpr bool keep_q = kKeepQ_, keep_dout = kKeepDout_;
  static constexpr int threads = 32 * warps, per_sm = kBlocksPerSm_;
  static constexpr int shared = 2 * D * (2 * tile_rows + 4 * block) + tile_rows * static_cast<int>(sizeof(Stats));
};

template <class C>
__global__ void __launch_bounds__(C::threads, C::per_sm)
    attention_dq_kernel(const __grid_constant__ AttentionBwd b, float scale2, Stats* stats) {
  using T = typename C::T;
  constexpr int D = C::D, MT = C::MT, N = C::step;
  using L = RowLayout<D>;
  const Attention& a = b.fwd;
  const int head = static_cast<int>(blockIdx.x) % a.n_head;
  const Tile tile = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, tile_rows);
  if (tile.seq < 0) return;
  const Sequence seq(a, tile.seq);
  const int n_row = seq.q_len - tile.row;
  if (n_row <= 0) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int kv_head = head / (a.n_head / a.n_kv_head), n_key = min(seq.q_len, tile.row + tile_rows);
  const int64_t token = seq.q0 + tile.row;
  const T* q = static_cast<const T*>(a.q) + token * a.ldq + head * D;
  const T* dout = static_cast<const T*>(b.dout) + token * b.lddout + head * D;
  const T* k = static_cast<const T*>(a.k) + seq.kv0 * a.ldk + kv_head * D;
  const T* v = static_cast<const T*>(a.v) + seq.kv0 * a.ldv + kv_head * D;

  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t tile_bytes = 2 * D * tile_rows, block_bytes = 2 * D * C::block;
  const uint32_t q_shared = shared_address(shared), kv_shared = q_shared + 2 * tile_bytes;
  Stats* const row_stats = reinterpret_cast<Stats*>(shared + 2 * tile_bytes + 4 * block_bytes);
  const auto copy_block = [&](int i, int stage) {
    const uint32_t to = kv_shared + static_cast<uint32_t>(stage) * 2 * block_bytes;
    const int first = i * C::block;
    copy_rows_async<D, C::block, C::threads>(to, k + first * a.ldk, a.ldk, seq.q_len - first, tid);
    copy_rows_async<D, C::block, C::threads>(to + block_bytes, v + first * a.ldv, a.ldv, seq.q_len - first, tid);
    cp_async_commit();
  };
  copy_rows_async<D, tile_rows, C::threads>(q_shared, q, a.ldq, n_row, tid);
  copy_rows_async<D, tile_rows, C::threads>(q_shared + tile_bytes, dout, b.lddout, n_row, tid);
  copy_block(0, 0);

  {  // delta, while the copies run
    const T* out = static_cast<const T*>(a.out) + token * a.ldo + head * D;
    const int c = tid % L::lanes;
#pragma unroll
    for (int r = 0; r < tile_rows; r += C::threads / L::lanes) {
      const int row = r + tid / L::lanes;
      float sum = 0.0f;
      if (row < n_row) {
#pragma unroll
        for (int j = 0; j < D / 8; j += L::lanes) {
          float x[8], y[8];
          load<T, 8>(x, out + row * a.ldo + (c + j) * 8);
          load<T, 8>(y, dout + row * b.lddout + (c + j) * 8);
#pragma unroll
          for (int e = 0; e < 8; e++) sum += x[e] * y[e];
        }
      }
      sum = warp_sum<L::lanes>(sum);
      if (c == 0) {
        const Stats s = {row < n_row ? a.lse[(token + row) * a.n_head + head] * log2_e : 0.0f, sum};
        row_stats[row] = s;
        if (row < n_row) stats[head * a.n_tok + token + row] = s;
      }
    }
  }

  const int warp_row = warp * 16 * MT, first_row = tile.row + warp_row;
  const FragmentAddress<D> rows(0, Pattern::rows, lane), cols(0, Pattern::cols, lane);
  const auto row_bytes = static_cast<uint32_t>(warp_row * L::bytes);
  RowOperand<D, MT, C::keep_q> q_rows{q_shared + row_bytes};
  RowOperand<D, MT, C::keep_dout> dout_rows{q_shared + tile_bytes + row_bytes};
  float dq[MT][D / 8][4];
  set_zero(dq);
  cp_async_wait<0>();
  __syncthreads();
  q_rows.load(rows);
  dout_rows.load(rows);
  Stats st[2 * MT];
#pragma unroll
  for (int r = 0; r < 2 * MT; r++) st[r] = row_stats[warp_row + r * 8 + lane / 4];

  const auto step = [&]<int M, bool kMask>(uint32_t ks, uint32_t vs, int first_hidden) {
    float s[MT][M / 8][4], dp[MT][M / 8][4];
    set_zero(s);
    set_zero(dp);
    multiply_rows<T, D, MT, M>(s, q_rows, ks, rows, cols);
    multiply_rows<T, D, MT, M>(dp, dout_rows, vs, rows, cols);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int c = 0; c < M / 8; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const Stats& x = st[2 * m + e / 2];
          float p = exp2_fast(s[m][c][e] * scale2 - x.lse2);
          if constexpr (kMask) {
            const int row = m * 16 + e / 2 * 8 + lane / 4, key = c * 8 + lane % 4 * 2 + e % 2;
            if (key >= row + first_hidden) p = 0.0f;
          }
          s[m][c][e] = p * (dp[m][c][e] - x.delta);
        }
      }
    }
    multiply_columns<T, D, MT, M>(dq, s, ks, rows);
  };

  const int n_block = (n_key + C::block - 1) / C::block;
  for (int i = 0;; i++) {
    if (i + 1 < n_block) copy_block(i + 1, (i + 1) & 1);
    const uint32_t ks = kv_shared + static_cast<uint32_t>(i & 1) * 2 * block_bytes, vs = ks + block_bytes;
    const int first_hidden = first_row + 1 - i * C::block;
    if (warp_row < n_row && first_hidden >= C::block) {
#pragma unroll 1
      for (int part = 0; part < C::block; part += N) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<N, false>(ks + at, vs + at, 0);
      }
    } else if (warp_row < n_row) {
      const int seen = min(n_key, first_row + 16 * MT) - i * C::block;
#pragma unroll 1
      for (int part = 0; part < seen && part < C::block; part += 32) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<32, true>(ks + at, vs + at, first_hidden - part);
      }
    }
    if (i + 1 >= n_block) break;
    cp_async_wait<0>();
    __syncthreads();
  }
  if (warp_row >= n_row) return;
  float factor[2 * MT];
#pragma unroll
  for (int r = 0; r < 2 * MT; r++) factor[r] = a.scale;
  T* dst = static_cast<T*>(b.dq) + (token + warp_row) * b.lddq + head * D;
  store_rows<D, MT>(dst, b.lddq, n_row - warp_row, shared + row_bytes, lane, dq, factor);
}

// Several heads a block. kBlock keys a stage, kStep at a time in registers.
template <class T_, int D_, int kWarps_, int kBlock_, int kStep_, int kBlocksPerSm_>
struct QueryHeadsShape {
  using T = T_;
  static constexpr int D = D_, warps = kWarps_, block = kBlock_, step = kStep_, MT = tile_rows / (16 * warps);
  static constexpr int threads = 32 * warps, per_sm = kBlocksPerSm_;
  // q, dout, out; room for dq on its way out; k and v twice; lse
  static constexpr int shared = 2 * D * (4 * tile_rows + 4 * block) + tile_rows * static_cast<int>(sizeof(float));
};

template <class C>
__global__ void __launch_bounds__(C::threads, C::per_sm)
    attention_dq_heads_kernel(const __grid_constant__ AttentionBwd b, float scale2, Stats* stats, int heads) {
  using T = typename C::T;
  constexpr int D = C::D, MT = C::MT, N = C::step;
  using L = RowLayout<D>;
  const Attention& a = b.fwd;
  const int columns = a.n_head / heads, first_head = static_cast<int>(blockIdx.x) % columns * heads;
  const Tile tile = find_tile(a, static_cast<int>(blockIdx.x) / columns, tile_rows);
  if (tile.seq < 0) return;
  const Sequence seq(a, tile.seq);
  const int n_row = seq.q_len - tile.row;
  if (n_row <= 0) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int group = a.n_head / a.n_kv_head, n_key = min(seq.q_len, tile.row + tile_rows);
  const int n_block = (n_key + C::block - 1) / C::block, n_turn = heads * n_block;
  const int64_t token = seq.q0 + tile.row;

  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t tile_bytes = 2 * D * tile_rows, block_bytes = 2 * D * C::block;
  constexpr uint32_t kv_at = 4 * tile_bytes, lse_at = kv_at + 4 * block_bytes;
  const uint32_t base = shared_address(shared);
  // A turn is one block of keys for one head.
  const auto copy_turn = [&](int head, int i, int stage) {
    const int first = i * C::block, kv_column = (first_head + head) / group * D, left = seq.q_len - first;
    if (i == 0) {
      const int column = (first_head + head) * D;
      const T* q = static_cast<const T*>(a.q) + token * a.ldq + column;
      const T* dout = static_cast<const T*>(b.dout) + token * b.lddout + column;
      const T* out = static_cast<const T*>(a.out) + token * a.ldo + column;
      copy_rows_async<D, tile_rows, C::threads>(base, q, a.ldq, n_row, tid);
      copy_rows_async<D, tile_rows, C::threads>(base + tile_bytes, dout, b.lddout, n_row, tid);
      copy_rows_async<D, tile_rows, C::threads>(base + 2 * tile_bytes, out, a.ldo, n_row, tid);
      for (int row = tid; row < tile_rows; row += C::threads) {
        const float* lse = a.lse + token * a.n_head + first_head + head;
        cp_async4(base + lse_at + static_cast<uint32_t>(row) * 4, row < n_row ? lse + row * a.n_head : lse,
                  row < n_row);
      }
    }
    const uint32_t to = base + kv_at + static_cast<uint32_t>(stage) * 2 * block_bytes;
    const T* k = static_cast<const T*>(a.k) + (seq.kv0 + first) * a.ldk + kv_column;
    const T* v = static_cast<const T*>(a.v) + (seq.kv0 + first) * a.ldv + kv_column;
    copy_rows_async<D, C::block, C::threads>(to, k, a.ldk, left, tid);
    copy_rows_async<D, C::block, C::threads>(to + block_bytes, v, a.ldv, left, tid);
    cp_async_commit();
  };
  copy_turn(0, 0, 0);

  const int warp_row = warp * 16 * MT, first_row = tile.row + warp_row;
  const FragmentAddress<D> rows(0, Pattern::rows, lane), cols(0, Pattern::cols, lane);
  const auto row_bytes = static_cast<uint32_t>(warp_row * L::bytes);
  RowOperand<D, MT, true> q{base + row_bytes}, dout{base + tile_bytes + row_bytes};
  float dq[MT][D / 8][4];
  Stats st[2 * MT];

  const auto begin = [&](int head) {
    q.load(rows);
    dout.load(rows);
    set_zero(dq);
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float delta[2] = {};
#pragma unroll
      for (int c = 0; c < D / 16; c++) {
        uint32_t x[4];
        ldmatrix(x, base + 2 * tile_bytes + row_bytes + rows.at(16 * m, c));
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 o = unpack2<T>(x[e]), g = unpack2<T>(dout.kept[m][c][e]);
          delta[e % 2] += o.x * g.x;
          delta[e % 2] += o.y * g.y;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        const float lse = *reinterpret_cast<const float*>(shared + lse_at + row * 4);
        st[2 * m + half] = {lse * log2_e, warp_sum<4>(delta[half])};
        if (lane % 4 == 0 && row < n_row) stats[(first_head + head) * a.n_tok + token + row] = st[2 * m + half];
      }
    }
  };
  const auto step = [&]<int M, bool kMask>(uint32_t ks, uint32_t vs, int first_hidden) {
    float s[MT][M / 8][4], dp[MT][M / 8][4];
    set_zero(s);
    set_zero(dp);
    multiply_rows<T, D, MT, M>(s, q, ks, rows, cols);
    multiply_rows<T, D, MT, M>(dp, dout, vs, rows, cols);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int c = 0; c < M / 8; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const Stats& x = st[2 * m + e / 2];
          float p = exp2_fast(s[m][c][e] * scale2 - x.lse2);
          if constexpr (kMask) {
            const int row = m * 16 + e / 2 * 8 + lane / 4, key = c * 8 + lane % 4 * 2 + e % 2;
            if (key >= row + first_hidden) p = 0.0f;
          }
          s[m][c][e] = p * (dp[m][c][e] - x.delta);
        }
      }
    }
    multiply_columns<T, D, MT, M>(dq, s, ks, rows);
  };

  cp_async_wait<0>();
  __syncthreads();
  int head = 0, i = 0;
  for (int turn = 0;; turn++) {
    const bool last = i + 1 == n_block;
    if (i == 0) {
      begin(head);
      if (last) __syncthreads();  // the copy below overwrites what begin reads
    }
    const int next_head = last ? head + 1 : head, next_i = last ? 0 : i + 1;
    if (turn + 1 < n_turn) copy_turn(next_head, next_i, (turn + 1) & 1);
    const uint32_t ks = base + kv_at + static_cast<uint32_t>(turn & 1) * 2 * block_bytes, vs = ks + block_bytes;
    const int first_hidden = first_row + 1 - i * C::block;
    if (warp_row < n_row && first_hidden >= C::block) {
#pragma unroll 1
      for (int part = 0; part < C::block; part += N) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<N, false>(ks + at, vs + at, 0);
      }
    } else if (warp_row < n_row) {
      const int seen = min(n_key, first_row + 16 * MT) - i * C::block;
#pragma unroll 1
      for (int part = 0; part < seen && part < C::block; part += 32) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<32, true>(ks + at, vs + at, first_hidden - part);
      }
    }
    if (last && warp_row < n_row) {
      float factor[2 * MT];
#pragma unroll
      for (int r = 0; r < 2 * MT; r++) factor[r] = a.scale;
      T* dst = static_cast<T*>(b.dq) + (token + warp_row) * b.lddq + (first_head + head) * D;
      store_rows<D, MT>(dst, b.lddq, n_row - warp_row, shared + 3 * tile_bytes + row_bytes, lane, dq, factor);
    }
    head = next_head, i = next_i;
    if (turn + 1 == n_turn) break;
    cp_async_wait<0>();
    __syncthreads();
  }
}

}  // namespace mm::cuda
