// Router of a mixture of experts: softmax and choice, order of the tokens by expert, balance loss, weighted sum.
//
// route   scores = softmax(logits) in fp32; the top_k best, ties to the lower expert; weights = scores (/ their sum).
//         A token belongs to G neighbouring lanes (G = 1 .. 32, the power of two that holds n_expert; above 32 a lane
//         has every 32nd expert). The j-th choice is the best of those that come after choice j - 1 in the order (score
//         down, expert up), which needs no list of what was taken. NaN counts as less than every score.
// sort    a stable counting sort of the n top_k pairs, two kernels: histogram of each block's stretch of pairs; then
// each
//         block adds up the histograms before its own, and ranks its pairs 256 at a time: rank within the warp by
//         __match_any, within the block by the warps' counts. Nothing depends on which block runs first.
// balance sums of scores per expert in double: blocks over tokens, then one block over blocks.
// combine a thread 16 bytes of a row (forward), a warp a pair (backward, with the dot product for dweights).
//
// Bytes, n = 24576, E = 4, top 1, d = 768, bf16: route 0.2 + 0.6 MB; sort 0.4 MB; combine 113 MB forward (out twice,
// y), 113 MB backward (dout, y, dy): 38 us each at 3 TB/s; the others are bound by launches. Measured on an H100: route
// 5.2 us, sort 9, balance 9, route backward 5.5, combine 43 (2.63 TB/s) forward and backward.
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {

namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- route --------------------------------------------------------------------------------------------------------

template <class T, int G>
__global__ void __launch_bounds__(kThreads)
    route_fwd_kernel(float* scores, int32_t* experts, float* weights, const T* logits, int64_t n, int n_expert,
                     int top_k, bool norm) {
  // Groups past the end work on the last token, for the shuffles, and write nothing.
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / G;
  const bool live = group < n;
  const int64_t t = live ? group : n - 1;
  const int lane = static_cast<int>(threadIdx.x) % G;
  const T* x = logits + t * n_expert;
  float* p = scores + t * n_expert;
  float m = __int_as_float(0xff800000);
  for (int e = lane; e < n_expert; e += G) m = max_nan(m, to_float(x[e]));
  m = warp_max<G>(m);
  float s = 0;
  for (int e = lane; e < n_expert; e += G) s += expf(to_float(x[e]) - m);
  s = warp_sum<G>(s);
  if (live) {
    for (int e = lane; e < n_expert; e += G) p[e] = expf(to_float(x[e]) - m) / s;
  }
  float last = __int_as_float(0x7f800000), sum = 0;
  int last_e = -1;
  for (int pass = 0; pass < 2; pass++) {  // the weights need the sum first: choose twice rather than remember
    if (pass == 1 && !norm) sum = 1.0f;
    else if (pass == 1) sum += 1e-20f;
    last = __int_as_float(0x7f800000), last_e = -1;
    for (int j = 0; j < top_k; j++) {
      float best = -2.0f, value = 0;
      int best_e = n_expert;
      for (int e = lane; e < n_expert; e += G) {
        // The same expression as above gives the same bits; the score of another group's token is not in memory.
        const float v = expf(to_float(x[e]) - m) / s, key = v >= 0 ? v : -1.0f;
        const bool after = key < last || (key == last && e > last_e);
        if (after && (key > best || (key == best && e < best_e))) best = key, value = v, best_e = e;
      }
#pragma unroll
      for (int i = G / 2; i > 0; i /= 2) {
        const float k = __shfl_xor_sync(kAllLanes, best, i), v = __shfl_xor_sync(kAllLanes, value, i);
        const int e = __shfl_xor_sync(kAllLanes, best_e, i);
        if (k > best || (k == best && e < best_e)) best = k, value = v, best_e = e;
      }
      last = best, last_e = best_e;
      if (pass == 0) {
        sum += value;
      } else if (live && lane == 0) {
        experts[t * top_k + j] = best_e;
        weights[t * top_k + j] = value / sum;
      }
    }
  }
}

template <class T, int G>
__global__ void __launch_bounds__(kThreads)
    route_bwd_kernel(T* dlogits, const float* dweights, const float* daux, const float* scores, const int32_t* experts,
                     int64_t n, int n_expert, int top_k, bool norm) {
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / G;
  const bool live = group < n;
  const int64_t t = live ? group : n - 1;
  const int lane = static_cast<int>(threadIdx.x) % G;
  const float* p = scores + t * n_expert;
  const float* dw = dweights + t * top_k;
  const int32_t* chosen = experts + t * top_k;
  float sum = 1e-20f, weighted = 0;
  for (int j = 0; j < top_k; j++) {
    const float score = p[chosen[j]];
    sum += score, weighted += dw[j] * score;
  }
  const float shift = weighted / sum;
  const auto dscore = [&](int e) {
    float s = daux == nullptr ? 0.0f : daux[e];
    for (int j = 0; j < top_k; j++) {
      if (chosen[j] == e) s += norm ? (dw[j] - shift) / sum : dw[j];
    }
    return s;
  };
  float inner = 0;
  for (int e = lane; e < n_expert; e += G) inner += p[e] * dscore(e);
  inner = warp_sum<G>(inner);
  if (!live) return;
  for (int e = lane; e < n_expert; e += G) dlogits[t * n_expert + e] = from_float<T>(p[e] * (dscore(e) - inner));
}

// f(integral constant G) for the lanes that a token gets.
template <class F>
void dispatch_lanes(int n_expert, F&& f) {
  if (n_expert <= 1) f(std::integral_constant<int, 1>());
  else if (n_expert <= 2) f(std::integral_constant<int, 2>());
  else if (n_expert <= 4) f(std::integral_constant<int, 4>());
  else if (n_expert <= 8) f(std::integral_constant<int, 8>());
  else if (n_expert <= 16) f(std::integral_constant<int, 16>());
  else f(std::integral_constant<int, 32>());
}

// --- sort ---------------------------------------------------------------------------------------------------------

constexpr int kWarps = kThreads / 32, kMaxSortBlocks = 512;

// counts [block][expert]
__global__ void __launch_bounds__(kThreads)
    count_kernel(int32_t* counts, const int32_t* experts, int64_t pairs, int64_t per_block, int n_expert) {
  extern __shared__ int32_t count[];
  for (int e = static_cast<int>(threadIdx.x); e < n_expert; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * per_block, last = min(first + per_block, pairs);
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads)
    atomicAdd(&count[experts[i]], 1);  // integers: any order
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < n_expert; e += kThreads)
    counts[static_cast<int64_t>(blockIdx.x) * n_expert + e] = count[e];
}

__global__ void __launch_bounds__(kThreads)
    rank_kernel(int32_t* slot, int32_t* rows, int32_t* offset, const int32_t* counts, const int32_t* experts,
                int64_t pairs, int64_t per_block, int top_k, int n_expert) {
  extern __shared__ int32_t shared[];
  int32_t* next = shared;                // [n_expert] first free row of each expert, for this block
  int32_t* in_warp = shared + n_expert;  // [kWarps][n_expert] counts, then rows
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int n_block = static_cast<int>(gridDim.x), mine = static_cast<int>(blockIdx.x);
  // Per expert: pairs of all blocks (kept in in_warp's first row for the moment) and of the blocks before this one.
  for (int e = warp; e < n_expert; e += kWarps) {
    int32_t all = 0, before = 0;
    for (int b = lane; b < n_block; b += 32) {
      const int32_t c = counts[static_cast<int64_t>(b) * n_expert + e];
      all += c;
      if (b < mine) before += c;
    }
    all = warp_sum(all), before = warp_sum(before);
    if (lane == 0) in_warp[e] = all, next[e] = before;
  }
  __syncthreads();
  if (tid == 0) {
    int32_t first = 0;
    for (int e = 0; e < n_expert; e++) {
      if (mine == 0) offset[e] = first;
      next[e] += first;
      first += in_warp[e];
    }
    if (mine == 0) offset[n_expert] = first;
  }
  const int64_t begin = blockIdx.x * per_block, end = min(begin + per_block, pairs);
  for (int64_t i0 = begin; i0 < end; i0 += kThreads) {
    __syncthreads();
    for (int j = tid; j < kWarps * n_expert; j += kThreads) in_warp[j] = 0;
    __syncthreads();
    const int64_t i = i0 + tid;
    const int e = i < end ? experts[i] : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) in_warp[warp * n_expert + e] = __popc(same);
    __syncthreads();
    for (int j = tid; j < n_expert; j += kThreads) {
      int32_t row = next[j];
      for (int w = 0; w < kWarps; w++) {
        const int32_t c = in_warp[w * n_expert + j];
        in_warp[w * n_expert + j] = row;
        row += c;
      }
      next[j] = row;
    }
    __syncthreads();
    if (e >= 0) {
      const int32_t row = in_warp[warp * n_expert + e] + rank;
      slot[i] = row;
      rows[row] = static_cast<int32_t>(i / top_k);
    }
  }
}

// --- balance ------------------------------------------------------------------------------------------------------

constexpr int kBalanceBlocks = 64;

// partial [block][expert]: sums of the block's tokens.
__global__ void __launch_bounds__(kThreads)
    score_sums_kernel(double* partial, const float* scores, int64_t n, int n_expert) {
  __shared__ double sums[kThreads];
  const int64_t per_block = (n + gridDim.x - 1) / gridDim.x, first = blockIdx.x * per_block,
                last = min(first + per_block, n);
  for (int e0 = 0; e0 < n_expert; e0 += kThreads) {
    const int wide = min(n_expert - e0, kThreads), lanes = kThreads / wide;  // threads that share an expert
    const int e = static_cast<int>(threadIdx.x) % wide, part = static_cast<int>(threadIdx.x) / wide;
    double s = 0;
    if (part < lanes) {
      for (int64_t t = first + part; t < last; t += lanes) s += static_cast<double>(scores[t * n_expert + e0 + e]);
    }
    sums[threadIdx.x] = s;
    __syncthreads();
    for (int n_part = lanes; n_part > 1;) {  // parts i and i + half, until one is left
      const int half = (n_part + 1) / 2;
      if (part + half < n_part) sums[threadIdx.x] += sums[threadIdx.x + half * wide];
      __syncthreads();
      n_part = half;
    }
    if (part == 0) partial[static_cast<int64_t>(blockIdx.x) * n_expert + e0 + e] = sums[threadIdx.x];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    balance_kernel(double* aux, float* daux, const float* share, const double* partial, int n_block,
                   const int32_t* offset, int64_t n, int n_expert, double coef) {
  __shared__ double sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double loss = 0;
  for (int e = static_cast<int>(threadIdx.x) / 32; e < n_expert; e += kWarps) {  // a warp an expert
    const double load = static_cast<double>(offset[e + 1] - offset[e]) / static_cast<double>(n);
    const double scale = coef * n_expert * load;
    if (daux != nullptr && lane == 0) daux[e] = *share * static_cast<float>(scale / static_cast<double>(n));
    if (aux != nullptr) {
      double mean = 0;
      for (int b = lane; b < n_block; b += 32) mean += partial[static_cast<int64_t>(b) * n_expert + e];
      mean = warp_sum(mean);
      if (lane == 0) loss += scale * (mean / static_cast<double>(n));
    }
  }
  if (aux == nullptr) return;
  loss = block_sum(loss, sums);
  if (threadIdx.x == 0) *aux += static_cast<double>(*share) * loss;
}

// --- combine ------------------------------------------------------------------------------------------------------

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    combine_fwd_kernel(T* out, const T* y, const int32_t* slot, const float* weights, int64_t n, int top_k, int64_t d) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, per_row = d / V;
  if (i >= n * per_row) return;
  const int64_t t = i / per_row, column = i % per_row * V;
  float s[V];
  load<T, V>(s, out + t * d + column);
  for (int j = 0; j < top_k; j++) {
    const float w = weights[t * top_k + j];
    float x[V];
    load<T, V>(x, y + slot[t * top_k + j] * d + column);
#pragma unroll
    for (int c = 0; c < V; c++) s[c] += w * x[c];
  }
  store<T, V>(out + t * d + column, s);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    combine_bwd_kernel(T* dy, float* dweights, const T* dout, const T* y, const int32_t* slot, const float* weights,
                       int64_t pairs, int top_k, int64_t d) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= pairs) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float w = weights[i];
  const T* g = dout + i / top_k * d;
  const int64_t row = slot[i] * d;
  float dot = 0;
#pragma unroll 3
  for (int64_t c = lane * V; c < d; c += 32 * V) {
    float a[V], b[V];
    load<T, V>(a, g + c);
    load<T, V>(b, y + row + c);
#pragma unroll
    for (int j = 0; j < V; j++) dot += a[j] * b[j], a[j] *= w;
    store<T, V>(dy + row + c, a);
  }
  dot = warp_sum(dot);
  if (lane == 0) dweights[i] = dot;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(div_up(threads, kThreads)); }

}  // namespace

void moe_route_fwd(const Context& ctx, DType t, float* scores, int32_t* experts, float* weights, const void* logits,
                   int64_t n, int n_expert, int top_k, bool norm) {
  if (n == 0) return;
  dispatch(t, [&]<class T>(T) {
    dispatch_lanes(n_expert, [&]<int G>(std::integral_constant<int, G>) {
      route_fwd_kernel<T, G><<<blocks_for(n * G), kThreads, 0, ctx.stream>>>(
          scores, experts, weights, static_cast<const T*>(logits), n, n_expert, top_k, norm);
    });
  });
  MM_CUDA_LAUNCHED();
}

void moe_route_bwd(const Context& ctx, DType t, void* dlogits, const float* dweights, const float* daux,
                   const float* scores, const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm) {
  if (n == 0) return;
  dispatch(t, [&]<class T>(T) {
    dispatch_lanes(n_expert, [&]<int G>(std::integral_constant<int, G>) {
      route_bwd_kernel<T, G><<<blocks_for(n * G), kThreads, 0, ctx.stream>>>(static_cast<T*>(dlogits), dweights, daux,
                                                                             scores, experts, n, n_expert, top_k, norm);
    });
  });
  MM_CUDA_LAUNCHED();
}

void moe_sort(const Context& ctx, int32_t* slot, int32_t* rows, int32_t* offset, const int32_t* experts, int64_t n,
              int top_k, int n_expert) {
  const int64_t pairs = n * top_k;
  if (pairs == 0) {
    MM_CUDA_CHECK(cudaMemsetAsync(offset, 0, (static_cast<size_t>(n_expert) + 1) * sizeof(int32_t), ctx.stream));
    return;
  }
  const int64_t per_block = div_up(div_up(pairs, kMaxSortBlocks), kThreads) * kThreads;
  const auto blocks = static_cast<unsigned>(div_up(pairs, per_block));
  auto* counts = Scratch(ctx).take<int32_t>(static_cast<size_t>(blocks) * static_cast<size_t>(n_expert));
  const size_t one = static_cast<size_t>(n_expert) * sizeof(int32_t);
  if ((kWarps + 1) * one > 48 * 1024) fail("moe_sort", "more than 1365 experts", __FILE__, __LINE__);
  count_kernel<<<blocks, kThreads, one, ctx.stream>>>(counts, experts, pairs, per_block, n_expert);
  MM_CUDA_LAUNCHED();
  rank_kernel<<<blocks, kThreads, (kWarps + 1) * one, ctx.stream>>>(slot, rows, offset, counts, experts, pairs,
                                                                    per_block, top_k, n_expert);
  MM_CUDA_LAUNCHED();
}

void moe_balance(const Context& ctx, double* aux, float* daux, const float* share, const float* scores,
                 const int32_t* offset, int64_t n, int n_expert, double coef) {
  if (n == 0 || (aux == nullptr && daux == nullptr)) return;
  double* partial = nullptr;
  int blocks = 0;
  if (aux != nullptr) {
    blocks = static_cast<int>(std::min<int64_t>(kBalanceBlocks, div_up(n, 64)));
    partial = Scratch(ctx).take<double>(static_cast<size_t>(blocks) * static_cast<size_t>(n_expert));
    score_sums_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream>>>(partial, scores, n, n_expert);
    MM_CUDA_LAUNCHED();
  }
  balance_kernel<<<1, kThreads, 0, ctx.stream>>>(aux, daux, share, partial, blocks, offset, n, n_expert, coef);
  MM_CUDA_LAUNCHED();
}

void moe_combine_fwd(const Context& ctx, DType t, void* out, const void* y, const int32_t* slot, const float* weights,
                     int64_t n, int top_k, int64_t d) {
  if (n == 0 || d == 0) return;
  dispatch(t, [&]<class T>(T) {
    constexpr int kWide = per_16_bytes<T>;
    const auto run = [&](auto kernel, int v) {
      kernel<<<blocks_for(n * (d / v)), kThreads, 0, ctx.stream>>>(static_cast<T*>(out), static_cast<const T*>(y), slot,
                                                                   weights, n, top_k, d);
    };
    if (d % kWide == 0 && aligned({out, y})) run(combine_fwd_kernel<T, kWide>, kWide);
    else run(combine_fwd_kernel<T, 1>, 1);
  });
  MM_CUDA_LAUNCHED();
}

void moe_combine_bwd(const Context& ctx, DType t, void* dy, float* dweights, const void* dout, const void* y,
                     const int32_t* slot, const float* weights, int64_t n, int top_k, int64_t d) {
  const int64_t pairs = n * top_k;
  if (pairs == 0) return;
  dispatch(t, [&]<class T>(T) {
    constexpr int kWide = per_16_bytes<T>;
    const auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(div_up(pairs, kWarps)), kThreads, 0, ctx.stream>>>(
          static_cast<T*>(dy), dweights, static_cast<const T*>(dout), static_cast<const T*>(y), slot, weights, pairs,
          top_k, d);
    };
    if (d % kWide == 0 && aligned({dy, dout, y})) run(combine_bwd_kernel<T, kWide>);
    else run(combine_bwd_kernel<T, 1>);
  });
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
