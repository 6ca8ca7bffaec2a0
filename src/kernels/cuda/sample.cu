// From rows of logits to tokens, with the filters and random numbers of engine/sampler.h: one block a row, which keeps
// the row's scores in shared memory (rows of more than 48,000 logits: in scratch memory, read from the L2 cache).
//
//   1 score = edited logit / temperature, -inf where masked; maximum
//   2 histogram of the distances to the maximum in 2,048 bins of 1/64; the bins that hold top_k tokens (without top-k:
//     as many as fit) give the candidates
//   3 candidates sorted by (distance, id): top-p is a prefix of their running sum, min-p too; the draw is the place
//     where u times the kept sum falls in the running sum (by probability with top-p, else by id, as on the host)
//
// Where more than kThreads candidates would have to be sorted (flat or tied logits), thresholds come from selections by
// 11, 11 and 10 bits of the key, with sums in integers of 2^-28. Every sum has a fixed order or is of integers, so a
// row gives the same token whatever else is drawn beside it.
//
// Bytes: n_vocab sizeof(T) a row; the time is that of some fifteen barriers and ten walks over shared memory.
//
// Measured on an H100 in a graph, 6,400 logits, 1 / 96 rows (us): greedy 2.8 / 3.1, top-k 50 with top-p 0.85 6.0 / 6.3,
// with 300 edits a row 6.9 / 7.2, top-k 50 alone 7.0 / 7.3, no filter 4.5 / 4.8, top-p 0.9 alone over a wide
// distribution 17, by selection on bits 26 to 36. Slower: sorting the candidates of top-k in place of counting
// ranks 8.8, 512 threads 6.6, the random number by every thread 6.6. Log-probabilities: 3.8 us, and 0.75 us for each of
// the top.
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample.cuh"

namespace mm::cuda {
namespace {

constexpr int sample_threads = 1024;
constexpr int64_t most_on_chip = 48000;  // scores; with SampleShared less than the 227 KB of an H100, else see below

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(int32_t* ids, int32_t* ids_host, const T* logits, int64_t ld, int n_vocab, const RowSampling* params,
                  const LogitEdit* edits, const uint32_t* masks, float* scratch) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<SampleShared<kThreads>*>(memory);
  const int64_t row = blockIdx.x;
  float* score =
      scratch != nullptr ? scratch + row * n_vocab : reinterpret_cast<float*>(memory + sizeof(SampleShared<kThreads>));
  const RowSampling p = params[row];
  wait_for_previous();
  const int32_t id = sample_row<kThreads>(shared, score, logits + row * ld, n_vocab, p, edits, masks);
  if (threadIdx.x == 0) {
    ids[row] = id;
    if (ids_host != nullptr) *static_cast<volatile int32_t*>(ids_host + row) = id;
  }
}

int shared_limit() {
  static const int bytes = [] {
    int device = 0, most = 0;
    MM_CUDA_CHECK(cudaGetDevice(&device));
    MM_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return most;
  }();
  return bytes;
}

// --- log-probabilities --------------------------------------------------------------------------------------------
constexpr int logprob_threads = 512;

// 64 bits that order (logit, id): the larger logit, then the lower id, is larger.
__device__ __forceinline__ uint64_t rank_of(float x, int id) {
  return uint64_t{~sampling::descending_key(x)} << 32 | ~static_cast<uint32_t>(id);
}

template <class T>
__global__ void __launch_bounds__(logprob_threads)
    logprobs_kernel(float* logprob, int32_t* top_ids, float* top_logprob, const T* logits, int64_t ld, int n_vocab,
                    const int32_t* ids, int n_top) {
  __shared__ float warp_max_of[32], warp_sum_of[32];
  __shared__ uint64_t warp_best[32];
  const int64_t row = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const T* x = logits + row * ld;
  // Each thread knows the best of its own logits below what has been taken; only the thread that had the last winner
  // looks again.
  const auto best_below = [&](uint64_t bound) {
    uint64_t best = 0;
    for (int i = tid; i < n_vocab; i += logprob_threads) {
      const uint64_t r = rank_of(to_float(x[i]), i);
      if (r < bound && r > best) best = r;
    }
    return best;
  };
  float max = -INFINITY, sum = 0;
  for (int i = tid; i < n_vocab; i += logprob_threads) max = max_nan(max, to_float(x[i]));
  max = block_max(max, warp_max_of);
  for (int i = tid; i < n_vocab; i += logprob_threads) sum += expf(to_float(x[i]) - max);
  const float log_sum = logf(block_sum(sum, warp_sum_of));
  if (tid == 0) {
    const int id = ids[row];
    logprob[row] = id >= 0 && id < n_vocab ? to_float(x[id]) - max - log_sum : __int_as_float(0x7fffffff);
  }
  uint64_t mine = best_below(~uint64_t{0});
  for (int k = 0; k < n_top; k++) {
    uint64_t best = mine;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      const uint64_t y = __shfl_xor_sync(0xffffffffu, best, i);
      best = y > best ? y : best;
    }
    if (lane == 0) warp_best[warp] = best;
    __syncthreads();
    best = lane < logprob_threads / 32 ? warp_best[lane] : 0;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      const uint64_t y = __shfl_xor_sync(0xffffffffu, best, i);
      best = y > best ? y : best;
    }
    __syncthreads();
    if (best != 0 && best == mine) {
      const auto id = static_cast<int32_t>(~static_cast<uint32_t>(best));
      top_ids[row * n_top + k] = id;
      top_logprob[row * n_top + k] = to_float(x[id]) - max - log_sum;
      mine = best_below(best);
    } else if (best == 0 && tid == 0) {  // fewer logits than asked for
      top_ids[row * n_top + k] = -1;
      top_logprob[row * n_top + k] = -INFINITY;
    }
  }
}

__global__ void resolve_kernel(int32_t* ids, const int32_t* source, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int32_t id = ids[i];
  if (id < 0) ids[i] = source[-1 - id];
}

}  // namespace

void sample_rows(const Context& ctx, DType t, int32_t* ids, int32_t* ids_host, const void* logits, int64_t ld,
                 int64_t n_vocab, const RowSampling* params, const LogitEdit* edits, const uint32_t* masks, int64_t n) {
  if (n == 0) return;
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = sample_kernel<T, sample_threads>;
    constexpr int64_t fixed = sizeof(SampleShared<sample_threads>);
    const int64_t on_chip = fixed + n_vocab * static_cast<int64_t>(sizeof(float));
    const bool fits = n_vocab <= most_on_chip && on_chip <= shared_limit();
    static const cudaError_t once =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit());
    MM_CUDA_CHECK(once);
    Scratch scratch(ctx);
    const int64_t step = fits ? n : std::min<int64_t>(n, static_cast<int64_t>(scratch.left()) / 4 / n_vocab);
    if (step == 0) fail("sampling", "a row does not fit the scratch memory", __FILE__, __LINE__);
    float* scores = fits ? nullptr : scratch.take<float>(static_cast<size_t>(step * n_vocab));
    for (int64_t first = 0; first < n; first += step) {  // one after another on the stream: they share the scratch
      const auto blocks = static_cast<unsigned>(std::min(step, n - first));
      launch_overlapped(ctx, kernel, dim3(blocks), sample_threads, static_cast<size_t>(fits ? on_chip : fixed), 1,
                        ids + first, ids_host != nullptr ? ids_host + first : nullptr,
                        static_cast<const T*>(logits) + first * ld, ld, static_cast<int>(n_vocab), params + first,
                        edits, masks, scores);
    }
  });
}

void row_logprobs(const Context& ctx, DType t, float* logprob, int32_t* top_ids, float* top_logprob, const void* logits,
                  int64_t ld, int64_t n_vocab, const int32_t* ids, int n_top, int64_t n) {
  if (n == 0) return;
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    logprobs_kernel<T><<<static_cast<unsigned>(n), logprob_threads, 0, ctx.stream>>>(
        logprob, top_ids, top_logprob, static_cast<const T*>(logits), ld, static_cast<int>(n_vocab), ids, n_top);
  });
  MM_CUDA_LAUNCHED();
}

void resolve_ids(const Context& ctx, int32_t* ids, const int32_t* source, int64_t n) {
  if (n == 0) return;
  resolve_kernel<<<static_cast<unsigned>(div_up(n, 128)), 128, 0, ctx.stream>>>(ids, source, n);
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
