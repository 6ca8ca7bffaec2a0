// RMSNorm of every head (optional) and rotary embedding, forward and backward:
//   u = x rstd w (or x),  y[i] = u[i] cos - u[i + half] sin,  y[i + half] = u[i + half] cos + u[i] sin.
//
// Memory-bound. G lanes own a head of a token, 8 pairs a lane; the heads of all tokens are dealt out to the lane groups
// one after the other, so that no lanes idle where a token has an odd number of heads (G = 6 for heads of 96: 30 of
// 32):
//
//   one head of 96   |lane 0: 0..7|1: 8..15|..|5: 40..47|lane 0: 48..55|1: 56..63|..|5: 88..95|
//   warp 0           token 0: q0 q1 q2 q3 q4,  warp 1: q5 q6 q7 k0 k1,  warp 2: k2 k3 v0 v1 v2,  ...
//
// Backward works in place, so it walks the heads with a grid that fits the machine at once; some blocks take the heads
// of the queries, the others those of the keys. Each lane sums the weights' gradients of its columns, blocks leave a
// row of partial sums each. Head widths or addresses that do not allow 16-byte accesses take one warp a head and plain
// loops.
//
// Bytes: forward 2 n (H + 2 K) d_head sizeof(T), backward 3 n (H + K) d_head sizeof(T).
#include "kernels/cuda/column_sums.cuh"
#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {
namespace {

constexpr int kWarps = 8;

struct RopeShape {
  const float *cos, *sin;
  const int32_t* positions;
  float eps;
  int64_t n;
  int n_head, n_kv_head, d_head;
};

template <class T>
struct FwdArgs {
  T *q_out, *k_out, *v_out;
  int64_t ldk, ldv;
  const int64_t* slots;
  const T *qkv, *q_weight, *k_weight;
};

template <class T>
struct BwdArgs {
  T* dqkv;
  float* partial;
  const T *qkv, *q_weight, *k_weight;
  int q_blocks;  // the first blocks of the grid take queries
};

// Where head h of token t goes.
template <class T>
__device__ __forceinline__ T* head_out(const FwdArgs<T>& a, const RopeShape& s, int64_t t, int h) {
  if (h < s.n_head) return a.q_out + (t * s.n_head + h) * s.d_head;
  const int64_t row = a.slots != nullptr ? a.slots[t] : t;
  if (h < s.n_head + s.n_kv_head) return a.k_out + row * a.ldk + static_cast<int64_t>(h - s.n_head) * s.d_head;
  return a.v_out + row * a.ldv + static_cast<int64_t>(h - s.n_head - s.n_kv_head) * s.d_head;
}

// Sum over the G lanes of a group, the same bits in each of them. first: the group's first lane.
template <int G>
__device__ __forceinline__ float group_sum(float x, int first) {
  if constexpr ((G & (G - 1)) == 0) return warp_sum<G>(x);
  float sum = __shfl_sync(0xffffffffu, x, first);
#pragma unroll
  for (int i = 1; i < G; i++) sum += __shfl_sync(0xffffffffu, x, first + i);
  return sum;
}

// --- forward ------------------------------------------------------------------------------------------------------
// `heads` of a token: queries, keys and, when they are copied, values. Each group takes U of them.
template <class T, int V, int G, int U, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) fwd_kernel(FwdArgs<T> a, RopeShape s, unsigned heads) {
  constexpr int kGroups = 32 / G;
  const int lane = threadIdx.x % 32, group = lane / G, half = s.d_head / 2, c = (lane - group * G) * V,
            rotated = s.n_head + s.n_kv_head;
  const unsigned items = static_cast<unsigned>(s.n) * heads;
  const unsigned first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * (kGroups * U) + group;
  unsigned token[U];
  int head[U];
  bool on[U];
  Raw<T, V> lo[U] = {}, hi[U] = {};
#pragma unroll
  for (int j = 0; j < U; j++) {
    const unsigned item = first + j * kGroups;
    on[j] = group < kGroups && c < half && item < items;
    token[j] = item / heads, head[j] = static_cast<int>(item - token[j] * heads);
    if (!on[j]) continue;
    const T* x = a.qkv + (static_cast<int64_t>(token[j]) * (rotated + s.n_kv_head) + head[j]) * s.d_head + c;
    lo[j].load(x), hi[j].load(x + half);
  }
#pragma unroll
  for (int j = 0; j < U; j++) {
    const bool turns = on[j] && head[j] < rotated;
    const T* w = head[j] < s.n_head ? a.q_weight : a.k_weight;
    float cos[V] = {}, sin[V] = {};
    Raw<T, V> w_lo = {}, w_hi = {};
    if (turns) {
      const int64_t at = static_cast<int64_t>(s.positions[token[j]]) * half + c;
      load(cos, s.cos + at), load(sin, s.sin + at);
      if (w != nullptr) w_lo.load(w + c), w_hi.load(w + c + half);
    }
    float u[V], v[V], sum = 0;
    lo[j].get(u), hi[j].get(v);
#pragma unroll
    for (int i = 0; i < V; i++) sum += u[i] * u[i] + v[i] * v[i];
    sum = group_sum<G>(sum, group * G);
    if (!on[j]) continue;
    T* out = head_out(a, s, token[j], head[j]) + c;
    if (!turns) {
      lo[j].store(out), hi[j].store(out + half);
      continue;
    }
    if (w != nullptr) {
      const float r = __frsqrt_rn(sum / static_cast<float>(s.d_head) + s.eps);
      float wu[V], wv[V];
      w_lo.get(wu), w_hi.get(wv);
#pragma unroll
      for (int i = 0; i < V; i++) u[i] = u[i] * r * wu[i], v[i] = v[i] * r * wv[i];
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float y = u[i] * cos[i] - v[i] * sin[i];
      v[i] = v[i] * cos[i] + u[i] * sin[i];
      u[i] = y;
    }
    store(out, u), store(out + half, v);
  }
}

template <class T>
__global__ void fwd_any(FwdArgs<T> a, RopeShape s) {
  const int lane = threadIdx.x % 32, half = s.d_head / 2, rotated = s.n_head + s.n_kv_head,
            heads = rotated + (a.v_out != nullptr ? s.n_kv_head : 0);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = item / heads;
  if (t >= s.n) return;
  const int h = static_cast<int>(item % heads);
  const T* x = a.qkv + (t * (rotated + s.n_kv_head) + h) * s.d_head;
  T* out = head_out(a, s, t, h);
  if (h >= rotated) {
    for (int i = lane; i < s.d_head; i += 32) out[i] = x[i];
    return;
  }
  const T* w = h < s.n_head ? a.q_weight : a.k_weight;
  float r = 1;
  if (w != nullptr) {
    float sum = 0;
    for (int i = lane; i < s.d_head; i += 32) sum += to_float(x[i]) * to_float(x[i]);
    r = __frsqrt_rn(warp_sum(sum) / static_cast<float>(s.d_head) + s.eps);
  }
  const int64_t at = static_cast<int64_t>(s.positions[t]) * half;
  for (int i = lane; i < half; i += 32) {
    const float u = to_float(x[i]) * r * (w != nullptr ? to_float(w[i]) : 1),
                v = to_float(x[i + half]) * r * (w != nullptr ? to_float(w[i + half]) : 1);
    out[i] = from_float<T>(u * s.cos[at + i] - v * s.sin[at + i]);
    out[i + half] = from_float<T>(v * s.cos[at + i] + u * s.sin[at + i]);
  }
}

// --- backward -----------------------------------------------------------------------------------------------------
template <class T, int V, int G, int U, bool kNorm, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) bwd_kernel(BwdArgs<T> a, RopeShape s) {
  constexpr int kGroups = 32 / G;
  __shared__ __align__(16) float sums[kNorm ? kWarps * kGroups : 1][G * 2 * V];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / G, half = s.d_head / 2,
            c = (lane - group * G) * V;
  const bool active = group < kGroups && c < half, keys = static_cast<int>(blockIdx.x) >= a.q_blocks;
  const unsigned block = keys ? blockIdx.x - a.q_blocks : blockIdx.x,
                 blocks = keys ? gridDim.x - a.q_blocks : a.q_blocks, heads = keys ? s.n_kv_head : s.n_head,
                 items = static_cast<unsigned>(s.n) * heads;
  const int64_t width = static_cast<int64_t>(s.n_head + 2 * s.n_kv_head) * s.d_head,
                column = (keys ? s.n_head * s.d_head : 0) + c;
  const T* w = keys ? a.k_weight : a.q_weight;
  Raw<T, V> w_lo = {}, w_hi = {};
  if (kNorm && active) w_lo.load(w + c), w_hi.load(w + c + half);
  float dw_lo[V] = {}, dw_hi[V] = {};
  for (unsigned base = (block * kWarps + warp) * (kGroups * U); base < items; base += blocks * kWarps * kGroups * U) {
    unsigned token[U];
    int64_t at[U];
    bool on[U];
    Raw<T, V> d_lo[U] = {}, d_hi[U] = {}, x_lo[U] = {}, x_hi[U] = {};
#pragma unroll
    for (int j = 0; j < U; j++) {
      const unsigned item = base + j * kGroups + group;
      on[j] = active && item < items;
      token[j] = item / heads;
      at[j] = token[j] * width + column + static_cast<int64_t>(item - token[j] * heads) * s.d_head;
      if (!on[j]) continue;
      d_lo[j].load(a.dqkv + at[j]), d_hi[j].load(a.dqkv + at[j] + half);
      if (kNorm) x_lo[j].load(a.qkv + at[j]), x_hi[j].load(a.qkv + at[j] + half);
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
      float cos[V] = {}, sin[V] = {};
      if (on[j]) {
        const int64_t row = static_cast<int64_t>(s.positions[token[j]]) * half + c;
        load(cos, s.cos + row), load(sin, s.sin + row);
      }
      float u[V], v[V];  // the gradient before the rotation
      d_lo[j].get(u), d_hi[j].get(v);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float g = u[i] * cos[i] + v[i] * sin[i];
        v[i] = v[i] * cos[i] - u[i] * sin[i];
        u[i] = g;
      }
      if constexpr (kNorm) {
        float x[V], y[V], wx[V], wy[V];
        w_lo.forget(), w_hi.forget();
        x_lo[j].get(x), x_hi[j].get(y), w_lo.get(wx), w_hi.get(wy);
        float square = 0, inner = 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
          square += x[i] * x[i] + y[i] * y[i];
          inner += u[i] * wx[i] * x[i] + v[i] * wy[i] * y[i];
        }
        square = group_sum<G>(square, group * G), inner = group_sum<G>(inner, group * G);
        const float r = __frsqrt_rn(square / static_cast<float>(s.d_head) + s.eps);
        const float m = inner * r / static_cast<float>(s.d_head);
        x_lo[j].forget(), x_hi[j].forget(), w_lo.forget(), w_hi.forget();
        x_lo[j].get(x), x_hi[j].get(y), w_lo.get(wx), w_hi.get(wy);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float xhat = x[i] * r, yhat = y[i] * r;
          dw_lo[i] += u[i] * xhat, dw_hi[i] += v[i] * yhat;
          u[i] = r * (u[i] * wx[i] - xhat * m), v[i] = r * (v[i] * wy[i] - yhat * m);
        }
      }
      if (on[j]) store(a.dqkv + at[j], u), store(a.dqkv + at[j] + half, v);
    }
  }
  if constexpr (kNorm) {
    if (active) store(&sums[warp * kGroups + group][c], dw_lo), store(&sums[warp * kGroups + group][G * V + c], dw_hi);
    __syncthreads();
    for (int i = threadIdx.x; i < s.d_head; i += kWarps * 32) {
      const int col = i < half ? i : G * V + i - half;
      float sum = sums[0][col];
#pragma unroll 8
      for (int k = 1; k < kWarps * kGroups; k++) sum += sums[k][col];
      a.partial[static_cast<int64_t>(blockIdx.x) * s.d_head + i] = sum;
    }
  }
}

// One warp a head; each warp sums weight gradients in its own row of shared memory.
template <class T>
__global__ void bwd_any(BwdArgs<T> a, RopeShape s) {
  extern __shared__ float sums[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = s.d_head / 2;
  const bool keys = static_cast<int>(blockIdx.x) >= a.q_blocks;
  const int block = keys ? blockIdx.x - a.q_blocks : blockIdx.x, blocks = keys ? gridDim.x - a.q_blocks : a.q_blocks;
  const int heads = keys ? s.n_kv_head : s.n_head;
  const T* w = keys ? a.k_weight : a.q_weight;
  float* dw = sums + warp * s.d_head;
  for (int i = lane; i < s.d_head; i += 32) dw[i] = 0;
  for (int64_t item = static_cast<int64_t>(block) * kWarps + warp; item < s.n * heads;
       item += static_cast<int64_t>(blocks) * kWarps) {
    const int64_t t = item / heads, h = item % heads + (keys ? s.n_head : 0),
                  head = (t * (s.n_head + 2 * s.n_kv_head) + h) * s.d_head,
                  table = static_cast<int64_t>(s.positions[t]) * half;
    T* d = a.dqkv + head;
    const T* x = a.qkv + head;
    float r = 1, m = 0;
    if (w != nullptr) {
      float square = 0, inner = 0;
      for (int i = lane; i < half; i += 32) {
        const float p = to_float(d[i]), q = to_float(d[i + half]), cos = s.cos[table + i], sin = s.sin[table + i],
                    xp = to_float(x[i]), xq = to_float(x[i + half]);
        square += xp * xp + xq * xq;
        inner += (p * cos + q * sin) * to_float(w[i]) * xp + (q * cos - p * sin) * to_float(w[i + half]) * xq;
      }
      r = __frsqrt_rn(warp_sum(square) / static_cast<float>(s.d_head) + s.eps);
      m = warp_sum(inner) * r / static_cast<float>(s.d_head);
    }
    for (int i = lane; i < half; i += 32) {
      const float p = to_float(d[i]), q = to_float(d[i + half]), cos = s.cos[table + i], sin = s.sin[table + i];
      float u = p * cos + q * sin, v = q * cos - p * sin;
      if (w != nullptr) {
        const float xhat = to_float(x[i]) * r, yhat = to_float(x[i + half]) * r;
        dw[i] += u * xhat, dw[i + half] += v * yhat;
        u = r * (u * to_float(w[i]) - xhat * m), v = r * (v * to_float(w[i + half]) - yhat * m);
      }
      d[i] = from_float<T>(u), d[i + half] = from_float<T>(v);
    }
  }
  if (w == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < s.d_head; i += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < kWarps; k++) sum += sums[k * s.d_head + i];
    a.partial[static_cast<int64_t>(blockIdx.x) * s.d_head + i] = sum;
  }
}

// --- launches -----------------------------------------------------------------------------------------------------
// f(integral constant G) for the lanes that half a head takes at V elements each; false when no G fits.
template <int V, class F>
bool with_lanes(int d_head, F&& f) {
  const int lanes = d_head / 2 / V;
  if (d_head % (2 * V) != 0 || lanes > 16) return false;
  if (lanes == 1) f(std::integral_constant<int, 1>{});
  else if (lanes == 2) f(std::integral_constant<int, 2>{});
  else if (lanes <= 4) f(std::integral_constant<int, 4>{});
  else if (lanes == 6) f(std::integral_constant<int, 6>{});
  else if (lanes <= 8) f(std::integral_constant<int, 8>{});
  else if (lanes == 12) f(std::integral_constant<int, 12>{});
  else f(std::integral_constant<int, 16>{});
  return true;
}

RopeShape shape(const NormRope& a) { return {a.cos, a.sin, a.positions, a.eps, a.n, a.n_head, a.n_kv_head, a.d_head}; }

// Heads that a lane group has in flight, and blocks a multiprocessor.
constexpr int kFwdHeads = 2, kFwdBlocksPerSm = 3, kBwdHeads = 2, kBwdBlocksPerSm = 2;

template <class T, int V = 8, int U = kFwdHeads, int kBlocks = kFwdBlocksPerSm>
void fwd(const Context& ctx, const FwdArgs<T>& f, const RopeShape& s) {
  const int64_t heads = s.n_head + (f.v_out != nullptr ? 2 : 1) * s.n_kv_head, items = s.n * heads;
  const bool vectors = aligned({f.q_out, f.k_out, f.v_out, f.qkv, f.q_weight, f.k_weight, s.cos, s.sin}) &&
                       f.ldk % 8 == 0 && (f.v_out == nullptr || f.ldv % 8 == 0) && items < int64_t{1} << 31;
  const bool done =
      vectors && with_lanes<V>(s.d_head, [&](auto lanes) {
        const int64_t warps = div_up(items, 32 / lanes.value * U), block = warps <= ctx.n_sm ? 1 : kWarps;
        fwd_kernel<T, V, lanes.value, U, kBlocks>
            <<<static_cast<unsigned>(div_up(warps, block)), static_cast<unsigned>(block * 32), 0, ctx.stream>>>(
                f, s, static_cast<unsigned>(heads));
      });
  if (!done) fwd_any<T><<<static_cast<unsigned>(div_up(items, kWarps)), kWarps * 32, 0, ctx.stream>>>(f, s);
  MM_CUDA_LAUNCHED();
}

template <class T, int V = 8, int U = kBwdHeads, int kBlocks = kBwdBlocksPerSm>
void bwd(const Context& ctx, float* dq_weight, float* dk_weight, BwdArgs<T> b, const RopeShape& s) {
  const bool vectors = aligned({b.dqkv, b.qkv, b.q_weight, b.k_weight, s.cos, s.sin}) && s.n * s.n_head < int64_t{1}
                                                                                                              << 31;
  // Blocks in proportion to the heads, at least one of each kind, no more than there are heads for.
  const int64_t resident = int64_t{kBlocks} * ctx.n_sm,
                q_share = std::max<int64_t>(1, resident * s.n_head / (s.n_head + s.n_kv_head)),
                k_share = std::max<int64_t>(1, resident - q_share);
  b.q_blocks = static_cast<int>(std::min(div_up(s.n * s.n_head, kWarps), q_share));
  const int k_blocks = static_cast<int>(std::min(div_up(s.n * s.n_kv_head, kWarps), k_share));
  const auto blocks = static_cast<unsigned>(b.q_blocks + k_blocks);
  const bool norm = b.q_weight != nullptr;
  Scratch scratch(ctx);
  b.partial = norm ? scratch.take<float>(static_cast<size_t>(blocks) * static_cast<size_t>(s.d_head)) : nullptr;
  const bool done = vectors && with_lanes<V>(s.d_head, [&](auto lanes) {
                      if (norm)
                        bwd_kernel<T, V, lanes.value, U, true, kBlocks><<<blocks, kWarps * 32, 0, ctx.stream>>>(b, s);
                      else
                        bwd_kernel<T, V, lanes.value, U, false, kBlocks><<<blocks, kWarps * 32, 0, ctx.stream>>>(b, s);
                    });
  if (!done) {
    const size_t bytes = static_cast<size_t>(kWarps * s.d_head) * sizeof(float);
    if (bytes > 48 * 1024) fail("rope backward", "heads wider than 1536 are not supported", __FILE__, __LINE__);
    bwd_any<T><<<blocks, kWarps * 32, bytes, ctx.stream>>>(b, s);
  }
  MM_CUDA_LAUNCHED();
  if (norm) {
    add_column_sums(ctx, {dq_weight, b.partial, b.q_blocks},
                    {dk_weight, b.partial + static_cast<int64_t>(b.q_blocks) * s.d_head, k_blocks}, s.d_head);
  }
}

}  // namespace

void qk_norm_rope_fwd(const Context& ctx, DType t, void* q_out, void* k_out, int64_t ldk, void* v_out, int64_t ldv,
                      const int64_t* slots, const void* qkv, const NormRope& a) {
  if (a.n == 0) return;
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    fwd<T>(ctx,
           {static_cast<T*>(q_out), static_cast<T*>(k_out), static_cast<T*>(v_out), ldk, ldv, slots,
            static_cast<const T*>(qkv), static_cast<const T*>(a.q_weight), static_cast<const T*>(a.k_weight)},
           shape(a));
  });
}

void qk_norm_rope_bwd(const Context& ctx, DType t, void* dqkv, float* dq_weight, float* dk_weight, const void* qkv,
                      const NormRope& a) {
  if (a.n == 0) return;
  dispatch(t, [&](auto tag) {
    using T = decltype(tag);
    bwd<T>(ctx, dq_weight, dk_weight,
           {static_cast<T*>(dqkv), nullptr, static_cast<const T*>(qkv), static_cast<const T*>(a.q_weight),
            static_cast<const T*>(a.k_weight), 0},
           shape(a));
  });
}

}  // namespace mm::cuda
