// The script of a step, as every block runs it.
#pragma once

#include "kernels/cuda/decode_persistent_step.cuh"
#include "kernels/cuda/sample.cuh"

namespace mm::cuda::persistent {

// f(element type, d_head, heads of a key head) as compile-time constants.
template <class F>
__device__ __forceinline__ void with_heads(const Params& p, F&& f) {
  const int group = p.n_head / p.n_kv_head;
  const auto by_group = [&](auto t, auto d) {
    switch (group) {
      case 1: return f(t, d, std::integral_constant<int, 1>());
      case 2: return f(t, d, std::integral_constant<int, 2>());
      case 4: return f(t, d, std::integral_constant<int, 4>());
      default: return;
    }
  };
#ifdef MM_QUICK
  return f(bf16{}, std::integral_constant<int, 96>(), std::integral_constant<int, 2>());
#endif
  const auto by_width = [&](auto t) {
    switch (p.d_head) {
      case 32: return by_group(t, std::integral_constant<int, 32>());
      case 64: return by_group(t, std::integral_constant<int, 64>());
      case 96: return by_group(t, std::integral_constant<int, 96>());
      case 128: return by_group(t, std::integral_constant<int, 128>());
      default: return;
    }
  };
  if (p.kv_format == KvFormat::i8) by_width(int8_t{});
  else by_width(bf16{});
}

__device__ __forceinline__ Share share_of(const Params& p) {
  Share s;
  const int item = static_cast<int>(blockIdx.x), per_row = p.n_kv_head * p.max_split;
  if (item >= p.n_tok * per_row) return s;
  const int row = item / per_row;
  s.kv = item / p.max_split % p.n_kv_head, s.split = item % p.max_split;
  s.n_key = max(p.kv_len[row], 0), s.n_split = splits_of(p, s.n_key);
  if (s.split >= s.n_split) return s;
  const int per = (s.n_key + s.n_split - 1) / s.n_split;
  s.begin = min(s.split * per, s.n_key), s.end = min(s.begin + per, s.n_key);
  s.row = row;
  return s;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

constexpr int draw_bytes = (static_cast<int>(sizeof(SampleShared<n_thread>)) + 127) / 128 * 128;

// The next token of a row, by one block. The ring is free by now: it holds the scores (where they fit) and sample_row's
// memory.
__device__ __noinline__ void draw(const Params& p, unsigned char* smem, int row, const uint32_t* words) {
  auto& shared = *reinterpret_cast<SampleShared<n_thread>*>(smem);
  float* score = p.scores != nullptr ? p.scores + static_cast<int64_t>(row) * p.ex.logit_words
                                     : reinterpret_cast<float*>(smem + draw_bytes);
  const RowSampling sampling = p.sampling[row];
  constexpr int batch = 4;
  const int tid = static_cast<int>(threadIdx.x), n = p.ex.logit_words / 4;
  for (int first = tid; first < n; first += batch * n_thread) {
    uint4 x[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      if (first + i * n_thread < n) x[i] = load_words(words + 4 * (first + i * n_thread));
    }
    SpinGuard guard(12);
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int at = first + i * n_thread;
      if (at >= n) break;
      while (any_unset(x[i]) && !probing(p, 1)) x[i] = load_words(words + 4 * at), guard.spin();
      reinterpret_cast<uint4*>(score)[at] = x[i];
    }
  }
  __syncthreads();
  const int32_t id = sample_row<n_thread>(shared, score, score, p.n_vocab, sampling, p.edits, p.masks);
  if (tid == 0) {
    p.next_ids[row] = id;
    if (p.next_ids_host != nullptr) *static_cast<volatile int32_t*>(p.next_ids_host + row) = id;
  }
}

#ifdef MM_PERSISTENT_PROBE
#define MM_TRACE(event) \
  if (p.trace != nullptr && threadIdx.x == 0) p.trace[static_cast<int64_t>(blockIdx.x) * 1024 + (event)] = clock64()
#else
#define MM_TRACE(event)
#endif

template <WeightFormat kFormat, bool kWide>
__device__ __forceinline__ void work(const Params& p, unsigned char* smem, const int32_t* tokens, uint32_t step,
                                     Copier<kFormat>& copier) {
  const int2* segments = reinterpret_cast<const int2*>(smem + p.smem.segments);
  float* residual = reinterpret_cast<float*>(smem + p.smem.residual);
  const Share share = share_of(p);
  const uint32_t kv_ring = shared_address(smem + p.smem.kv_ring);
  int64_t row0 = 0, row1 = 0;
  if (share.any()) {
    const int lanes = p.d_head >= 64 ? 8 : 4, groups = n_thread / lanes, key = share.begin + static_cast<int>(threadIdx.x) / lanes;
    if (key < share.end && key < share.n_key - 1) row0 = key_row(p, share.row, key);
    if (key + groups < share.end && key + groups < share.n_key - 1) row1 = key_row(p, share.row, key + groups);
    float* turn = reinterpret_cast<float*>(smem + p.smem.rope);
    const int half = p.d_head / 2;
    const int64_t from = static_cast<int64_t>(p.positions[share.row]) * half;
    for (int i = static_cast<int>(threadIdx.x); i < half; i += n_thread) turn[i] = p.cos[from + i], turn[half + i] = p.sin[from + i];
  }
  const auto start_keys = [&](int layer) {
    if (!share.any() || layer == p.n_layer) return;
    if (p.kv_format == KvFormat::i8) {
      if (p.d_head == 32) prefetch_keys<int8_t, 32>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 64) prefetch_keys<int8_t, 64>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 96) prefetch_keys<int8_t, 96>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 128) prefetch_keys<int8_t, 128>(p, kv_ring, share, layer, row0, row1);
    } else {
      if (p.d_head == 32) prefetch_keys<bf16, 32>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 64) prefetch_keys<bf16, 64>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 96) prefetch_keys<bf16, 96>(p, kv_ring, share, layer, row0, row1);
      if (p.d_head == 128) prefetch_keys<bf16, 128>(p, kv_ring, share, layer, row0, row1);
    }
  };
  start_keys(0);

  Cursor cursor;
  const uint32_t capacity = static_cast<uint32_t>(p.smem.n_slots * slot_units);
  uint32_t* const set = p.ex.set[step & 1];
  const uint32_t* before = nullptr;  // the residual stream that the layer begins with; null: the embedding
  const int qkv_width = (p.n_head + 2 * p.n_kv_head) * p.d_head;
  for (int s = 0; s <= 4 * p.n_layer; s++) {
    const int layer = s / 4, kind = s == 4 * p.n_layer ? static_cast<int>(stage_head) : s % 4;
    uint32_t* const words = set + layer * p.ex.layer_words;
    const float* norms = p.norms + static_cast<int64_t>(layer) * p.norm_stride;
    const int2 tiles = segments[s];
    const int units = p.shape[kind].units, per = units_per_warp(units), per_pass = tiles_per_pass(units, p.smem.held);
    // o and down need nothing where they have no tiles; the others keep the residual stream.
    const bool idle = tiles.y == 0 && (kind == stage_o || kind == stage_down);
    MM_TRACE(s * 8);
    for (int done = 0; !idle && (done == 0 || done < tiles.y); done += per_pass) {
      const int n = min(tiles.y - done, per_pass);
      Held<kFormat> held;
      if (n > 0) {
        with_units_per_warp(per, [&](auto k) { take<kFormat, decltype(k)::value>(p, smem, held, cursor, units, n); });
        cursor.advance(static_cast<uint32_t>(n * units), capacity);
      }
      if (done == 0) {
        MM_TRACE(s * 8 + 1);
        if (kind == stage_o) take_pairs(p, smem, words + p.ex.merged, p.n_head * p.d_head / 2, 6);
        else if (kind == stage_down) take_pairs(p, smem, words + p.ex.act, p.d_ff / 2, 8);
        else if (kind == stage_gate_up) take_residual(p, smem, words + p.ex.mid, tokens, norms + p.d_model, 7);
        else take_residual(p, smem, before, tokens, norms, 5);
        MM_TRACE(s * 8 + 2);
      }
      __syncthreads();  // the input is there, the weights are in registers, the former sums have been read
      if (n <= 0) break;
      if (threadIdx.x / 32 == n_warp - 1) {
        copier.taken += static_cast<uint32_t>(n * units);
        copier.fill(p, smem);
      }
      with_units_per_warp(per, [&](auto k) { multiply<kFormat, kWide, decltype(k)::value>(p, smem, held, units, n); });
      __syncthreads();
      MM_TRACE(s * 8 + 3);
      reduce_parts(p, smem, n, [&](bool on, int i, int token, int row, float sum) {
        const int tile = tiles.x + done + i, column = tile * 8 + row, at = token * p.d_model + column;
        if (kind == stage_o || kind == stage_down) {
          if (on) publish(words + (kind == stage_o ? p.ex.mid : p.ex.out) + at, residual[at] + sum);
          return;
        }
        const float x = on ? norm_factor(p, smem, token) * sum : 0.0f;
        if (kind == stage_gate_up) {
          const float up = __shfl_down_sync(0xffffffffu, x, 4), act = silu(x) * up;
          const float next = __shfl_down_sync(0xffffffffu, act, 1);
          if (on && row < 4 && row % 2 == 0)
            publish(words + p.ex.act + token * (p.d_ff / 2) + tile * 2 + row / 2, pack2<bf16>(act, next));
        } else if (kind == stage_qkv) {
          if (on) publish(words + p.ex.qkv + token * qkv_width + column, x);
        } else if (on) {
          if (p.draw) publish(set + p.ex.logits + static_cast<int64_t>(token) * p.ex.logit_words + column, x);
          if (p.logits != nullptr && column < p.n_vocab) p.logits[static_cast<int64_t>(token) * p.n_vocab + column] = x;
        }
      });
    }
    MM_TRACE(s * 8 + 4);
    if (kind == stage_down) before = words + p.ex.out;
    if (kind != stage_qkv) continue;
    if (share.any()) {
      with_heads(p, [&](auto t, auto d, auto g) {
        attend<decltype(t), decltype(d)::value, decltype(g)::value>(p, smem, share, layer, words);
      });
      start_keys(layer + 1);
    }
    MM_TRACE(s * 8 + 5);
    for (int i = static_cast<int>(blockIdx.x); i < p.n_tok * p.n_head; i += static_cast<int>(gridDim.x)) {
      const int row = i / p.n_head, n_split = splits_of(p, p.kv_len[row]);
      if (n_split == 1) continue;
      if (p.d_head == 32) merge_parts<32>(p, smem, row, i % p.n_head, n_split, words);
      if (p.d_head == 64) merge_parts<64>(p, smem, row, i % p.n_head, n_split, words);
      if (p.d_head == 96) merge_parts<96>(p, smem, row, i % p.n_head, n_split, words);
      if (p.d_head == 128) merge_parts<128>(p, smem, row, i % p.n_head, n_split, words);
    }
    MM_TRACE(s * 8 + 6);
  }
  if (p.hidden != nullptr && blockIdx.x == 0) {
    const float* final_norm = p.norms + static_cast<int64_t>(p.n_layer) * p.norm_stride;
    for (int i = static_cast<int>(threadIdx.x); i < p.n_tok * p.d_model; i += n_thread)
      p.hidden[i] = residual[i] * norm_factor(p, smem, i / p.d_model) * final_norm[i % p.d_model];
  }
  if (p.draw && static_cast<int>(blockIdx.x) < p.n_tok)
    draw(p, smem, static_cast<int>(blockIdx.x),
         set + p.ex.logits + static_cast<int64_t>(blockIdx.x) * p.ex.logit_words);
  MM_TRACE((4 * p.n_layer + 1) * 8);
}

template <WeightFormat kFormat, bool kWide>
__global__ void __launch_bounds__(n_thread, 1) step_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ int32_t tokens[max_tokens];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  Copier<kFormat> copier(p);
  if (warp == n_warp - 1) {
    for (int i = tid % 32; i < p.smem.n_slots; i += 32) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      constexpr uint32_t arrivals = 1;
#else
      constexpr uint32_t arrivals = 32;
#endif
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(smem + p.smem.full) + 8 * static_cast<uint32_t>(i)),
                   "r"(arrivals)
                   : "memory");
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    hopper::mbarrier_init_fence();
#endif
    __syncwarp();
    copier.fill(p, smem);
  }
  const uint32_t step = p.state->step;
  const int n_segment = 4 * p.n_layer + 1;
  int2* segments = reinterpret_cast<int2*>(smem + p.smem.segments);
  for (int i = tid; i < n_segment; i += n_thread) segments[i] = p.segments[static_cast<int64_t>(blockIdx.x) * n_segment + i];
  if (tid < p.n_tok) {
    int id = p.ids[tid];
    if (id < 0 && p.prev_ids != nullptr) id = p.prev_ids[-1 - id];
    tokens[tid] = id < 0 || id >= p.n_vocab ? 0 : id;  // a failed draw (-1): any token, its sequence is over
  }
  __syncthreads();
  bool parts = false;
  for (int r = 0; r < p.n_tok; r++) parts |= splits_of(p, p.kv_len[r]) > 1;
  keep_house(p, step, parts);
  work<kFormat, kWide>(p, smem, tokens, step, copier);
  // All blocks have long read the state: this block's last input depends on all of them.
  if (blockIdx.x == 0 && tid == 0) {
    p.state->rows[step & 1] = p.n_tok, p.state->parts[step & 1] = parts ? 1 : 0;
    p.state->step = step + 1;
  }
}

}  // namespace mm::cuda::persistent
