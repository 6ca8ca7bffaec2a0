// The script of a step, as every block runs it.
#pragma once

#include "kernels/cuda/decode_persistent_alone.cuh"
#include "kernels/cuda/decode_persistent_row.cuh"
#include "kernels/cuda/sample.cuh"

namespace mm::cuda::persistent {

// f(element type, d_head, heads of a key head) as compile-time constants.
template <class T, class F>
__device__ __forceinline__ void with_heads(const Params& p, F&& f) {
  const auto by_group = [&](auto t, auto d) {
    switch (p.n_head / p.n_kv_head) {
      case 1: return f(t, d, std::integral_constant<int, 1>());
      case 2: return f(t, d, std::integral_constant<int, 2>());
      case 4: return f(t, d, std::integral_constant<int, 4>());
      default: return;
    }
  };
  const auto by_width = [&](auto t) {
    switch (p.d_head) {
      case 32: return by_group(t, std::integral_constant<int, 32>());
      case 64: return by_group(t, std::integral_constant<int, 64>());
      case 96: return by_group(t, std::integral_constant<int, 96>());
      case 128: return by_group(t, std::integral_constant<int, 128>());
      default: return;
    }
  };
  if constexpr (T::fixed) {
    constexpr std::integral_constant<int, T::d_head> d;
    constexpr std::integral_constant<int, T::group> g;
    if (p.kv_format == KvFormat::i8) f(int8_t{}, d, g);
    else f(bf16{}, d, g);
  } else {
    if (p.kv_format == KvFormat::i8) by_width(int8_t{});
    else by_width(bf16{});
  }
}
// f(d_head)
template <class T, class F>
__device__ __forceinline__ void with_width(const Params& p, F&& f) {
  if constexpr (T::fixed) {
    f(std::integral_constant<int, T::d_head>());
  } else {
    switch (p.d_head) {
      case 32: return f(std::integral_constant<int, 32>());
      case 64: return f(std::integral_constant<int, 64>());
      case 96: return f(std::integral_constant<int, 96>());
      case 128: return f(std::integral_constant<int, 128>());
      default: return;
    }
  }
}
template <class T, class F>
__device__ __forceinline__ void with_keys(const Params& p, F&& f) {  // f(element type, d_head)
  with_width<T>(p, [&](auto d) {
    if (p.kv_format == KvFormat::i8) f(int8_t{}, d);
    else f(bf16{}, d);
  });
}

__device__ __forceinline__ Share share_of(const Params& p) {
  Share s;
  const int item = static_cast<int>(blockIdx.x), per_row = p.n_kv_head * p.max_split;
  if (item >= p.n_tok * per_row) return s;
  const int row = item / per_row;
  s.kv = item / p.max_split % p.n_kv_head, s.split = item % p.max_split;
  s.n_key = max(p.rows[row].kv_len, 0), s.n_split = splits_of(p, s.n_key);
  if (s.split >= s.n_split) return s;
  const int per = (s.n_key + s.n_split - 1) / s.n_split;
  s.begin = min(s.split * per, s.n_key), s.end = min(s.begin + per, s.n_key);
  s.row = row, s.slot = p.rows[row].slot;
  return s;
}

constexpr int draw_bytes = (static_cast<int>(sizeof(SampleShared<n_thread>)) + 127) / 128 * 128;

// Calls f(index of four logits, the four) for a row's logits as they come in, dealt out over the block's threads.
template <class F>
__device__ __forceinline__ void each_logits(const Params& p, const uint32_t* words, F&& f) {
  constexpr int batch = 4;
  const int n = p.ex.logit_words / 4;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < n; first += batch * n_thread) {
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
      f(at, x[i]);
    }
  }
}

// The largest logit, the lowest id on a tie; -1 where a logit is NaN or +inf or all are -inf.
inline __device__ __noinline__ int32_t draw_greedy(const Params& p, SampleShared<n_thread>& shared,
                                                   const uint32_t* words) {
  const int tid = static_cast<int>(threadIdx.x);
  float best = minus_infinity();
  int id = 0x7fffffff, bad = 0;
  each_logits(p, words, [&](int at, const uint4& four) {
    const float x[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                        __uint_as_float(four.w)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (4 * at + i >= p.n_vocab) break;
      bad |= !(x[i] < -minus_infinity());
      if (x[i] > best) best = x[i], id = 4 * at + i;
    }
  });
  const auto over_lanes = [&](int width) {
#pragma unroll 1
    for (int i = width / 2; i > 0; i /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, i);
      const int other_id = __shfl_xor_sync(0xffffffffu, id, i);
      if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
  };
  over_lanes(32);
  if (tid % 32 == 0) shared.warp_max[tid / 32] = best, shared.low[tid / 32] = static_cast<uint32_t>(id);
  bad = __syncthreads_or(bad);
  if (tid < 32) {
    best = tid < n_warp ? shared.warp_max[tid] : minus_infinity();
    id = tid < n_warp ? static_cast<int>(shared.low[tid]) : 0x7fffffff;
    over_lanes(2 * n_warp);
  }
  return bad || id == 0x7fffffff ? -1 : id;
}

// The next token of a row, by one block. The ring is free by now: it holds the scores (where they fit) and sample_row's
// memory.
inline __device__ __noinline__ void draw(const Params& p, unsigned char* smem, int row, const uint32_t* words) {
  auto& shared = *reinterpret_cast<SampleShared<n_thread>*>(smem);
  const RowSampling sampling = p.sampling[row];
  int32_t id;
  if (sampling.temperature < 1e-3f && sampling.mask < 0 && sampling.edits_begin >= sampling.edits_end) {
    id = draw_greedy(p, shared, words);
  } else {
    float* score = p.scores != nullptr ? p.scores + static_cast<int64_t>(row) * p.ex.logit_words
                                       : reinterpret_cast<float*>(smem + draw_bytes);
    each_logits(p, words, [&](int at, const uint4& four) { reinterpret_cast<uint4*>(score)[at] = four; });
    __syncthreads();
    id = sample_row<n_thread>(shared, score, score, p.n_vocab, sampling, p.edits, p.masks);
  }
  if (threadIdx.x != 0) return;
  p.next_ids[row] = id;
  if (p.next_ids_host != nullptr) *static_cast<volatile int32_t*>(p.next_ids_host + row) = id;
}

__device__ __forceinline__ int32_t token_of(const Params& p, int row) {
  int id = p.rows[row].id;
  if (id < 0 && p.prev_ids != nullptr) id = p.prev_ids[-1 - id];
  return id < 0 || id >= p.n_vocab ? 0 : id;  // a failed draw (-1): any token, its sequence is over
}

// What an attention block does.
template <class T>
__device__ __forceinline__ void attend_only(const Params& p, unsigned char* smem, uint32_t step) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n_thread + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(p.n_attention) * n_thread;
  if (4 * first < p.d_model) {
    const float4 x = embedded(p, token_of(p, 0), static_cast<int>(4 * first));
    uint32_t* to = p.ex.set[step & 1] + p.ex.stream + 4 * first;
    publish(to, x.x), publish(to + 1, x.y), publish(to + 2, x.z), publish(to + 3, x.w);
  }
  prefetch_step(p, step, p.n_row_parts, first, stride);
  const Share share = share_of(p);
  const auto between = [&] {
    reset_before(p, step, first, stride);
    if (first == 0) await_begun(p, step);
  };
  if (share.any()) {
    with_keys<T>(p, [&](auto v, auto d) {
      attend_alone<decltype(v), decltype(d)::value, T::group>(p, smem, share, p.ex.set[step & 1], between);
    });
  } else {
    between();
  }
  if (p.draw && blockIdx.x == 0) {
    __syncthreads();  // the sums in shared memory have been read
    draw(p, smem, 0, p.ex.set[step & 1] + p.ex.logits);
  }
}

template <class T>
__device__ __forceinline__ void work(const Params& p, unsigned char* smem, const int32_t* tokens, uint32_t step,
                                     bool parts, Copier<T>& copier) {
  const int2* segments = reinterpret_cast<const int2*>(smem + p.smem.segments);
  const float* residual = reinterpret_cast<const float*>(smem + p.smem.residual);
  const Share share = share_of(p);
  if (share.any()) {
    with_width<T>(p, [&](auto d) { prepare_share<decltype(d)::value>(p, smem, share); });
    __syncthreads();
    with_keys<T>(p, [&](auto t, auto d) { start_keys<decltype(t), decltype(d)::value>(p, smem, share, 0); });
  }

  Cursor cursor;
  const uint32_t capacity = static_cast<uint32_t>(p.smem.n_slots * slot_units * T::unit);
  uint32_t* const set = p.ex.set[step & 1];
  uint32_t* words = set;             // of the layer
  const uint32_t* before = nullptr;  // the residual stream that the layer begins with; null: the embedding
  const float* norms = p.norms;
  const int d_model = T::d_model(p), d_ff = T::d_ff(p);
  int kind = p.n_layer > 0 ? static_cast<int>(stage_qkv) : static_cast<int>(stage_head);
#pragma unroll 1
  for (int s = 0, layer = 0; s <= 4 * p.n_layer; s++) {
    const int2 tiles = segments[s];
    const int units = p.shape[kind].units, per_pass = p.shape[kind].tiles_per_pass;
    // o and down need nothing where they have no tiles; the others keep the residual stream.
    const bool has_pairs = kind == stage_o || kind == stage_down, idle = tiles.y == 0 && has_pairs;
    MM_TRACE(s * 8);
#pragma unroll 1
    for (int done = 0; !idle && (done == 0 || done < tiles.y); done += per_pass) {
      const int n = min(tiles.y - done, per_pass);
      Held<T> held;
      const auto first_half = [&](auto k, int u) { take<T, decltype(k)::value>(p, smem, held, cursor, u, n); };
      const auto second_half = [&](auto k, int u) { multiply<T, decltype(k)::value>(p, smem, held, u, n); };
      const auto of_kind = [&](auto&& f) {
        if constexpr (T::fixed) {
          if (kind != stage_down) f(std::integral_constant<int, T::per_d>(), T::units_d);
          else f(std::integral_constant<int, T::per_ff>(), T::units_ff);
        } else {
          with_units_per_warp<0>(units, [&](auto k) { f(k, units); });
        }
      };
      if (n > 0) {
        of_kind(first_half);
        cursor.advance(static_cast<uint32_t>(n * units * T::unit), capacity);
      }
      if (done == 0) {
        if (kind == stage_gate_up && share.any() && layer + 1 < p.n_layer) {  // while the input is on its way
          __syncthreads();                                                    // attention is done with the buffers
          with_keys<T>(p,
                       [&](auto t, auto d) { start_keys<decltype(t), decltype(d)::value>(p, smem, share, layer + 1); });
        }
        MM_TRACE(s * 8 + 1);
        if (!has_pairs) {
          take_residual<T>(p, smem, kind == stage_gate_up ? words + p.ex.mid : before, tokens,
                           norms + (kind == stage_gate_up ? d_model : 0));
        } else {
          take_pairs<T>(p, smem, words + (kind == stage_o ? p.ex.merged : p.ex.act), p.shape[kind].k / 2);
        }
        MM_TRACE(s * 8 + 2);
      }
      __syncthreads();  // the input is there, the weights are in registers, the former sums have been read
      if (n <= 0) break;
      of_kind(second_half);
      __syncthreads();
      MM_TRACE(s * 8 + 3);
      if (copier.mine()) {  // these warps have nothing to add up, and time until the next input
        copier.taken += static_cast<uint32_t>(n * units);
        copier.fill(p, smem);
      }
      reduce_parts<T>(p, smem, n, [&](bool on, int i, int token, int row, float sum) {
        const int tile = tiles.x + done + i, column = tile * 8 + row;
        if (has_pairs) {
          const int at = token * d_model + column;
          if (on) publish(words + (kind == stage_o ? p.ex.mid : p.ex.out) + at, residual[at] + sum);
          return;
        }
        const float x = on ? norm_factor<T>(p, smem, token) * sum : 0.0f;
        if (kind == stage_gate_up) {
          const float up = __shfl_down_sync(0xffffffffu, x, 4), act = silu(x) * up;
          const float next = __shfl_down_sync(0xffffffffu, act, 1);
          if (on && row < 4 && row % 2 == 0)
            publish(words + p.ex.act + token * (d_ff / 2) + tile * 2 + row / 2, pack2<bf16>(act, next));
        } else if (kind == stage_qkv) {
          if (on) publish(words + p.ex.qkv + token * p.qkv_width + column, x);
        } else if (on) {
          if (p.draw) publish(set + p.ex.logits + token * p.ex.logit_words + column, x);
          if (p.logits != nullptr && column < p.n_vocab) p.logits[static_cast<int64_t>(token) * p.n_vocab + column] = x;
        }
      });
    }
    MM_TRACE(s * 8 + 4);
    if (s == 0 && threadIdx.x >= n_thread / 2) {
      constexpr int n = n_thread / 2;
      const int64_t first = static_cast<int64_t>(blockIdx.x) * n + threadIdx.x - n;
      prefetch_step(p, step, parts ? p.ex.n_parts : 0, first, static_cast<int64_t>(gridDim.x) * n);
      reset_before(p, step, first, static_cast<int64_t>(gridDim.x) * n);
      if (first == 0) await_begun(p, step);
    }
    if (kind == stage_qkv) {
      if (share.any()) {
        with_heads<T>(p, [&](auto t, auto d, auto g) {
          attend<decltype(t), decltype(d)::value, decltype(g)::value>(p, smem, share, layer, words);
        });
      }
      MM_TRACE(s * 8 + 5);
      if (parts) {
#pragma unroll 1
        for (int i = static_cast<int>(blockIdx.x); i < T::n_tok(p) * p.n_head; i += static_cast<int>(gridDim.x)) {
          const int row = i / p.n_head, n_split = splits_of(p, p.rows[row].kv_len);
          if (n_split == 1) continue;
          with_width<T>(p,
                        [&](auto d) { merge_parts<decltype(d)::value>(p, smem, row, i % p.n_head, n_split, words); });
        }
      }
      MM_TRACE(s * 8 + 6);
    }
    if (kind == stage_down) {
      before = words + p.ex.out, words += p.ex.layer_words, norms += p.norm_stride;
      layer++;
      kind = layer < p.n_layer ? static_cast<int>(stage_qkv) : static_cast<int>(stage_head);
    } else {
      kind++;
    }
  }
  if (p.hidden != nullptr && blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < T::n_tok(p) * d_model; i += n_thread)
      p.hidden[i] = residual[i] * norm_factor<T>(p, smem, i / d_model) * norms[i % d_model];
  }
  if (p.draw && static_cast<int>(blockIdx.x) < T::n_tok(p))
    draw(p, smem, static_cast<int>(blockIdx.x),
         set + p.ex.logits + static_cast<int64_t>(blockIdx.x) * p.ex.logit_words);
  MM_TRACE((4 * p.n_layer + 1) * 8);
}

// By now every block has read the state: block 0 waited for that.
template <class T>
__device__ __forceinline__ void end_step(const Params& p, uint32_t step, int parts) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  p.state->rows[step & 1] = T::n_tok(p), p.state->parts[step & 1] = parts;
  p.state->step = step + 1;
}

template <class T>
__global__ void __launch_bounds__(n_thread, 1) step_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint32_t step;
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) step = p.state->step;
  if constexpr (T::roles) {
    if (static_cast<int>(blockIdx.x) < p.n_attention) {
      __syncthreads();
      if (tid == 0) atomicAdd(&p.state->begun, 1u);
      attend_only<T>(p, smem, step);
      end_step<T>(p, step, p.n_row_parts);
      return;
    }
    uint4* passes = reinterpret_cast<uint4*>(smem + p.smem.passes);
    const uint4* from = reinterpret_cast<const uint4*>(p.passes + static_cast<int64_t>(blockIdx.x) * p.n_pass);
    for (int i = tid; i < 2 * p.n_pass; i += n_thread) passes[i] = from[i];
    RowCopier<T> copier(p, smem);
    if (tid < row_barriers) init_barrier(copier.full + 8 * static_cast<uint32_t>(tid), n_warp);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    hopper::mbarrier_init_fence();
#endif
    __syncthreads();
    if (tid == 0) atomicAdd(&p.state->begun, 1u);
    while (copier.pass->after == 0 && copier.pass->stage >= 0 && !probing(p, 2)) copier.step(p, 0);
    work_row<T>(p, smem, step, copier);
  } else {
    __shared__ int32_t tokens[max_tokens];
    Copier<T> copier(p);
    if (copier.mine()) {
      copier.init(p, smem);
      copier.fill(p, smem);
    }
    const int n_segment = 4 * p.n_layer + 1, n_tok = T::n_tok(p);
    int2* segments = reinterpret_cast<int2*>(smem + p.smem.segments);
    for (int i = tid; i < n_segment; i += n_thread)
      segments[i] = p.segments[static_cast<int64_t>(blockIdx.x) * n_segment + i];
    if (tid < n_tok * p.sum_stride) reinterpret_cast<float*>(smem + p.smem.sums)[tid] = 0.0f;
    if (tid < n_tok) tokens[tid] = token_of(p, tid);
    bool parts = false;
    for (int r = 0; r < n_tok; r++) parts |= splits_of(p, p.rows[r].kv_len) > 1;
    __syncthreads();
    if (tid == 0) atomicAdd(&p.state->begun, 1u);
    work<T>(p, smem, tokens, step, parts, copier);
    end_step<T>(p, step, parts ? p.ex.n_parts : 0);
  }
}

// The shapes of MiniMind's small models get kernels of their own, which are half as large and twice as fast.
template <WeightFormat kFormat, int... kShape>
Kernel for_tokens(const Params& p) {
  if (p.roles) return step_kernel<Traits<kFormat, 1, kShape...>>;
  return p.n_tok <= 4 ? step_kernel<Traits<kFormat, 4, kShape...>> : step_kernel<Traits<kFormat, 8, kShape...>>;
}
template <WeightFormat kFormat>
Kernel for_shape(const Params& p) {
  switch (known_shape(p)) {
    case 1: return for_tokens<kFormat, 768, 2432, 96, 2>(p);
    case 2: return for_tokens<kFormat, 512, 1408, 64, 4>(p);
    default: return step_kernel<Traits<kFormat, 8>>;
  }
}

}  // namespace mm::cuda::persistent
