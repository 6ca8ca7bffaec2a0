// One token from one row of logits, by one block: see sample.cu. A function of its own so that a kernel that has just
// computed the logits can draw as well.
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/sample.h"

namespace mm::cuda {

constexpr int sample_bins = 2048;

// Shared memory of a block of kThreads threads that draws. Free for other use between draws (behind a barrier).
template <int kThreads>
struct alignas(16) SampleShared {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024 && sample_bins % kThreads == 0);
  uint32_t low[sample_bins], high[sample_bins];  // of the weights of keys in a bin
  uint64_t list[kThreads];                       // candidates: key << 32 | id
  uint64_t warp_sum[32];
  uint64_t before;
  float warp_max[32], kept;
  double u;
  uint32_t prefix;
  int n_list, found;
};

namespace sampling {

template <int kThreads>
constexpr int few_candidates = kThreads / 8;

// Inclusive sum over the threads of the block, in their order. Ends behind a barrier.
template <int kThreads, class S>
__device__ __forceinline__ S block_scan(S x, S& total, uint64_t* shared) {
  static_assert(sizeof(S) <= 8);
  constexpr int n_warp = kThreads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto warp_scan = [&](S v) {
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const S y = __shfl_up_sync(0xffffffffu, v, i);
      if (lane >= i) v += y;
    }
    return v;
  };
  S* sums = reinterpret_cast<S*>(shared);
  x = warp_scan(x);
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  const S w = warp_scan(lane < n_warp ? sums[lane] : S{0});
  const S before = __shfl_sync(0xffffffffu, w, warp > 0 ? warp - 1 : 0);
  total = __shfl_sync(0xffffffffu, w, n_warp - 1);
  __syncthreads();
  return warp > 0 ? before + x : x;
}

// Sorts list[0, n), n <= kThreads, all different, ascending.
template <int kThreads>
__device__ __forceinline__ void sort_list(uint64_t* list, int n) {
  if (n <= few_candidates<kThreads>) {  // the place of each is the number of smaller ones; 8 lanes count
    const int mine = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
    const uint64_t x = mine < n ? list[mine] : 0;
    int place = 0;
    for (int i = lane; i < n; i += 8) place += list[i] < x ? 1 : 0;
    place = warp_sum<8>(place);
    __syncthreads();
    if (lane == 0 && mine < n) list[place] = x;
    __syncthreads();
    return;
  }
  int width = 32;
  while (width < n) width *= 2;
  const int i = static_cast<int>(threadIdx.x);
  const bool on = i < width;  // whole warps
  uint64_t x = i < n ? list[i] : ~uint64_t{0};
  __syncthreads();
  for (int size = 2; size <= width; size *= 2) {
    const bool up = (i & size) == 0;
    for (int step = size / 2; step > 0; step /= 2) {
      uint64_t y = 0;
      if (step >= 32) {
        if (on) list[i] = x;
        __syncthreads();
        if (on) y = list[i ^ step];
        __syncthreads();
      } else if (on) {
        y = __shfl_xor_sync(0xffffffffu, x, step);
      }
      const bool keep_low = ((i & step) == 0) == up;
      if (on) x = (y < x) == keep_low ? y : x;
    }
  }
  if (on) list[i] = x;
  __syncthreads();
}

// Larger number, smaller key.
__device__ __forceinline__ uint32_t descending_key(float x) {
  const uint32_t u = __float_as_uint(x == 0.0f ? 0.0f : x);
  return u >> 31 ? u : ~u & 0x7fffffffu;
}

// The smallest key K such that the weights of keys up to K add up to more than target (which must be below their sum),
// and in s.before the weight of the keys below K. Weights are below 2^28, so sums of integers, which no order changes.
template <int kThreads, class Key, class Weight>
__device__ uint32_t select_key(SampleShared<kThreads>& s, int n, uint64_t target, Key&& key, Weight&& weight) {
  constexpr int per_thread = sample_bins / kThreads;
  const int tid = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0;
  uint64_t before = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const int bits = shift == 0 ? 10 : 11;
    for (int b = tid; b < sample_bins; b += kThreads) s.low[b] = s.high[b] = 0;
    __syncthreads();
    for (int i = tid; i < n; i += kThreads) {
      const uint32_t k = key(i);
      if (shift != 21 && (k ^ prefix) >> (shift + bits) != 0) continue;
      const uint32_t w = weight(i), bin = k >> shift & ((1u << bits) - 1);
      if (w & 0x3fff) atomicAdd(&s.low[bin], w & 0x3fff);
      if (w >> 14) atomicAdd(&s.high[bin], w >> 14);
    }
    __syncthreads();
    uint64_t bin_weight[per_thread], sum = 0, total;
#pragma unroll
    for (int j = 0; j < per_thread; j++) {
      const int b = tid * per_thread + j;
      sum += bin_weight[j] = s.low[b] + (uint64_t{s.high[b]} << 14);
    }
    uint64_t at = before + block_scan<kThreads>(sum, total, s.warp_sum) - sum;
    if (at <= target && target < at + sum) {  // one thread
      int j = 0;
      while (target >= at + bin_weight[j]) at += bin_weight[j++];
      s.prefix = prefix | static_cast<uint32_t>(tid * per_thread + j) << shift;
      s.before = at;
    }
    __syncthreads();
    prefix = s.prefix, before = s.before;
  }
  return prefix;
}

// Id of match number `index` (from 0, by id) among the i in [0, n) with match(i).
template <int kThreads, class Match>
__device__ int nth_match(SampleShared<kThreads>& s, int n, int index, Match&& match) {
  const int tid = static_cast<int>(threadIdx.x), share = ((n + kThreads - 1) / kThreads) | 1;
  const int begin = min(tid * share, n), end = min(begin + share, n);
  int count = 0, total;
  for (int i = begin; i < end; i++) count += match(i) ? 1 : 0;
  int at = block_scan<kThreads>(count, total, s.warp_sum) - count;
  if (at <= index && index < at + count) {
    int i = begin;
    while (!match(i) || at++ < index) i++;
    s.found = i;
  }
  __syncthreads();
  return s.found;
}

// Draws in the order of ids: the first i whose cumulated weight exceeds u times their sum; weight 0 never.
template <int kThreads, class Weight>
__device__ int draw_by_id(SampleShared<kThreads>& s, int n, double u, Weight&& weight) {
  const int tid = static_cast<int>(threadIdx.x), share = ((n + kThreads - 1) / kThreads) | 1;  // odd: no bank conflicts
  const int begin = min(tid * share, n), end = min(begin + share, n);
  double sum = 0, total;
  int last = -1;
  for (int i = begin; i < end; i++) {
    const float w = weight(i);
    sum += static_cast<double>(w);
    if (w > 0.0f) last = i;
  }
  if (tid == 0) s.found = 0x7fffffff, s.n_list = -1;
  const double inclusive = block_scan<kThreads>(sum, total, s.warp_sum), target = u * total;
  double at = inclusive - sum;
  if (last >= 0) atomicMax(&s.n_list, last);
  // The borders of neighbours may differ by a rounding: whoever is first takes it, and if none does the last token.
  if (target < inclusive) {
    for (int i = begin; i < end; i++) {
      const float w = weight(i);
      at += static_cast<double>(w);
      if (w > 0.0f && target < at) {
        atomicMin(&s.found, i);
        break;
      }
    }
  }
  __syncthreads();
  return s.found != 0x7fffffff ? s.found : s.n_list;
}

}  // namespace sampling

// All kThreads threads of the block call it and receive the token, or -1 where a logit is NaN or +inf or none is
// allowed. score [n_vocab]: memory of the block, shared or global. The edits of a row name each id once; ids outside
// the vocabulary are passed over.
template <int kThreads, class T>
__device__ int32_t sample_row(SampleShared<kThreads>& s, float* score, const T* logits, int n_vocab,
                              const RowSampling& p, const LogitEdit* edits, const uint32_t* masks) {
  using namespace sampling;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const bool greedy = p.temperature < 1e-3f;  // as the host: less could overflow logit / temperature
  const float temperature = greedy ? 1.0f : p.temperature;

  // Scores: edited, masked, divided by the temperature; and their maximum (NaN if there is one).
  const uint32_t* mask = p.mask >= 0 ? masks + static_cast<int64_t>(p.mask) * ((n_vocab + 31) / 32) : nullptr;
  const bool edited = p.edits_begin < p.edits_end;
  float max = -INFINITY;
  const auto finish = [&](float x) {
    x /= temperature;
    max = max_nan(max, x);
    return x;
  };
  const auto take = [&](int i, float x) {
    if (mask != nullptr && x < INFINITY && (mask[i / 32] >> (i % 32) & 1) == 0) x = -INFINITY;
    score[i] = edited ? x : finish(x);
  };
  if (n_vocab % 8 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0) {
#pragma unroll 1
    for (int i = tid * 8; i < n_vocab; i += kThreads * 8) {
      float x[8];
      load(x, logits + i);
      uint32_t allowed = 0xff;
      if (mask != nullptr) allowed = mask[i / 32] >> (i % 32);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if ((allowed >> j & 1) == 0 && x[j] < INFINITY) x[j] = -INFINITY;
        if (!edited) x[j] = finish(x[j]);
      }
      *reinterpret_cast<float4*>(score + i) = make_float4(x[0], x[1], x[2], x[3]);
      *reinterpret_cast<float4*>(score + i + 4) = make_float4(x[4], x[5], x[6], x[7]);
    }
  } else {
    for (int i = tid; i < n_vocab; i += kThreads) take(i, to_float(logits[i]));
  }
  for (int b = tid; b < sample_bins; b += kThreads) s.low[b] = 0;
  if (edited) {
    __syncthreads();
    for (int j = p.edits_begin + tid; j < p.edits_end; j += kThreads) {
      const LogitEdit e = edits[j];
      if (e.id < 0 || e.id >= n_vocab) continue;
      float x = score[e.id];
      if (e.seen) x = x > 0 ? x / p.repetition : x * p.repetition;
      if (e.count > 0) x -= p.presence + p.frequency * static_cast<float>(e.count);
      score[e.id] = x + e.bias;
    }
    __syncthreads();
    for (int i = tid; i < n_vocab; i += kThreads) score[i] = finish(score[i]);
  }
  max = warp_max(max);
  if (lane == 0) s.warp_max[warp] = max;
  if (tid == 0) s.found = 0x7fffffff, s.n_list = 0;
  if (tid == kThreads - 1) {
    const uint4 bits = philox(p.seed, p.stream, p.index);
    s.u = static_cast<double>((uint64_t{bits.x} << 32 | bits.y) >> 11) * 0x1p-53;
  }
  __syncthreads();
  max = warp_max(lane < kThreads / 32 ? s.warp_max[lane] : -INFINITY);
  if (!(max < INFINITY) || max == -INFINITY) {
    __syncthreads();
    return -1;
  }
  if (greedy) {
    int best = 0x7fffffff;
    for (int i = tid; i < n_vocab; i += kThreads) {
      if (score[i] == max) best = min(best, i);
    }
    best = __reduce_min_sync(0xffffffffu, best);
    if (lane == 0 && best != 0x7fffffff) atomicMin(&s.found, best);
    __syncthreads();
    return s.found;
  }

  const double u = s.u;
  const bool any_k = p.top_k <= 0 || p.top_k >= n_vocab, any_p = !(p.top_p < 1.0f);
  const auto prob = [&](float x) { return expf(x - max); };  // times the sum of all
  if (any_k && any_p) {
    return draw_by_id(s, n_vocab, u, [&](int i) {
      const float e = prob(score[i]);
      return e >= p.min_p ? e : 0.0f;
    });
  }

  // Candidates: the bins next to the maximum, as many as hold top_k tokens or as fit the list. What lies below e^-31.98
  // of the maximum has less than 1e-8 of the probability together and is left out.
  const auto bin_of = [&](float x) {
    const float d = max - x;
    return d < 31.98f ? static_cast<int>(d * 64.0f) : sample_bins;
  };
  float part = 0;
  for (int i = tid; i < n_vocab; i += kThreads) {
    const float x = score[i];
    const int bin = bin_of(x);
    if (bin < sample_bins) atomicAdd(&s.low[bin], 1u);
    if (any_k) part += prob(x);
  }
  __syncthreads();
  float all_mass = 0;
  if (any_k) (void)block_scan<kThreads>(part, all_mass, s.warp_sum);
  constexpr int bins_each = sample_bins / kThreads, few = few_candidates<kThreads>;
  uint32_t bin_count = 0, n_counted;
#pragma unroll
  for (int j = 0; j < bins_each; j++) bin_count += s.low[tid * bins_each + j];
  const uint32_t counted = block_scan<kThreads>(bin_count, n_counted, s.warp_sum);
  // Without top-k first as many as are sorted quickly: mostly top-p leaves fewer.
  for (int room = any_k ? few : kThreads; room <= kThreads; room = room < kThreads ? kThreads : kThreads + 1) {
    const uint32_t wanted = any_k ? static_cast<uint32_t>(room) + 1 : static_cast<uint32_t>(p.top_k);
    uint32_t at = counted - bin_count;
    if (at < wanted && (counted >= wanted || tid == kThreads - 1)) {  // one thread
      int j = 0;
      while (j < bins_each && at + s.low[tid * bins_each + j] < wanted) at += s.low[tid * bins_each + j++];
      // The bins before this one hold `at` tokens, fewer than wanted; it reaches that number, if there is one that
      // does.
      const int bin = tid * bins_each + j;
      const bool reached = j < bins_each, with_it = reached && !any_k;
      s.prefix = static_cast<uint32_t>(with_it ? bin : bin - 1);
      s.before = with_it ? at + s.low[bin] : at;
      s.high[0] = !any_k || !reached;
      s.n_list = 0;
    }
    __syncthreads();
    const int last_bin = static_cast<int>(s.prefix), n = static_cast<int>(s.before);
    const bool complete = s.high[0] != 0;  // the list holds all that top-k leaves
    if (n > kThreads) break;
    for (int i = tid; i < n_vocab; i += kThreads) {
      const float x = score[i];
      if (bin_of(x) <= last_bin)
        s.list[atomicAdd(&s.n_list, 1)] = uint64_t{__float_as_uint(max - x)} << 32 | static_cast<uint32_t>(i);
    }
    __syncthreads();
    sort_list<kThreads>(s.list, n);
    const auto distance = [&](int i) { return static_cast<uint32_t>(s.list[i] >> 32); };
    const bool in_pool = tid < n && (any_k || p.top_k >= n || distance(tid) <= distance(p.top_k - 1));
    float e = in_pool ? expf(-__uint_as_float(distance(tid))) : 0.0f, pool_mass;
    float inclusive = block_scan<kThreads>(e, pool_mass, s.warp_sum);
    // In floats: of few terms, whose rounding a sum in double would not better much.
    const float limit = any_p ? INFINITY : p.top_p * (any_k ? all_mass : pool_mass);
    if (!complete && !__syncthreads_or(tid == n - 1 && inclusive > limit)) continue;
    const bool kept = in_pool && (tid == 0 || inclusive - e <= limit);
    const int n_kept = __syncthreads_count(kept && e >= p.min_p);
    float kept_mass;
    if (any_p) {  // in the order of ids
      const uint64_t mine = s.list[tid] << 32 | __float_as_uint(e);
      __syncthreads();
      if (tid < n_kept) s.list[tid] = mine;
      __syncthreads();
      sort_list<kThreads>(s.list, n_kept);
      e = tid < n_kept ? __uint_as_float(static_cast<uint32_t>(s.list[tid])) : 0.0f;
      inclusive = block_scan<kThreads>(e, kept_mass, s.warp_sum);
    } else {
      if (tid == n_kept - 1) s.kept = inclusive;
      __syncthreads();
      kept_mass = s.kept;
    }
    const double target = u * static_cast<double>(kept_mass);
    const int drawn = min(__syncthreads_count(tid < n_kept && static_cast<double>(inclusive) <= target), n_kept - 1);
    const uint64_t winner = s.list[drawn];
    __syncthreads();
    return static_cast<int32_t>(any_p ? winner >> 32 : winner & 0xffffffffu);
  }

  // Too many candidates to sort: by selection on the bits of scores and distances.
  const uint32_t bar = any_k ? 0xffffffffu
                             : select_key(
                                   s, n_vocab, static_cast<uint64_t>(p.top_k - 1),
                                   [&](int i) { return descending_key(score[i]); }, [](int) { return 1u; });
  const auto in_pool = [&](float x) { return descending_key(x) <= bar; };
  if (any_p) {
    return draw_by_id(s, n_vocab, u, [&](int i) {
      const float x = score[i], e = prob(x);
      return in_pool(x) && e >= p.min_p ? e : 0.0f;
    });
  }
  const auto fixed = [](float e) { return static_cast<uint32_t>(e * 0x1p28f + 0.5f) - (e >= 1.0f ? 1u : 0u); };
  const auto key = [&](int i) { return __float_as_uint(max - score[i]); };
  const auto weight = [&](int i) { return in_pool(score[i]) ? fixed(prob(score[i])) : 0u; };
  const auto mass_above = [&](float least) {
    uint64_t sum = 0, total;
    for (int i = tid; i < n_vocab; i += kThreads) sum += prob(score[i]) >= least ? weight(i) : 0u;
    (void)block_scan<kThreads>(sum, total, s.warp_sum);
    return total;
  };
  const uint64_t pool_mass = mass_above(0.0f);
  const auto limit =
      min(static_cast<uint64_t>(static_cast<double>(p.top_p) * static_cast<double>(pool_mass)), pool_mass - 1);
  const uint32_t border = select_key(s, n_vocab, limit, key, weight);
  const float border_prob = expf(-__uint_as_float(border));
  uint64_t kept_mass = 0;
  if (border_prob >= p.min_p) {
    const uint64_t each = fixed(border_prob);
    kept_mass = s.before + ((limit - s.before) / each + 1) * each;
  } else {
    kept_mass = mass_above(p.min_p);
  }
  __syncthreads();
  const auto target = min(static_cast<uint64_t>(u * static_cast<double>(kept_mass)), kept_mass - 1);
  const uint32_t drawn = select_key(s, n_vocab, target, key, weight);
  const auto index = static_cast<int>((target - s.before) / fixed(expf(-__uint_as_float(drawn))));
  return nth_match(s, n_vocab, index, [&](int i) { return key(i) == drawn && in_pool(score[i]); });
}

}  // namespace mm::cuda
