// RMSNorm of every head (optional) and rotary embedding, forward and backward:
//   u = x rstd w (or x),  y[i] = u[i] cos - u[i + half] sin,  y[i + half] = u[i + half] cos + u[i] sin.
//
// Memory-bound. G lanes own a head (G: power of two, 8 pairs a lane), 32 / G heads lie side by side in a warp and each
// lane group takes kHeads heads of the same token, so that cos and sin are loaded once for all of them and all loads
// are in flight together. With 8 + 4 + 4 heads of 96 (G = 8, two lanes of eight idle):
//
//   qkv of a token  |q0 q1 q2 q3|q4 q5 q6 q7|k0 k1 k2 k3|v0 v1 v2 v3|    one warp; group g: q_g, q_4+g, k_g, v_g
//   one head        |lane 0: 0..7|1: 8..15|..|5: 40..47|     |lane 0: 48..55|1: 56..63|..|      lane c: both halves
//
// Backward works in place, so it walks the tokens with a grid that fits the machine at once; some blocks take the heads
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

// --- forward ------------------------------------------------------------------------------------------------------
// A warp works on one token's heads [part * kHeads * 32 / G, ...).
template <class T, int G, int kHeads>
__global__ void __launch_bounds__(kWarps * 32) fwd_kernel(FwdArgs<T> a, RopeShape s, int parts) {
  constexpr int kGroups = 32 / G;
  const int lane = threadIdx.x % 32, group = lane / G, half = s.d_head / 2, c = lane % G * 8;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t t = item / parts;
  if (t >= s.n) return;
  const int head0 = static_cast<int>(item % parts) * kHeads * kGroups + group, rotated = s.n_head + s.n_kv_head,
            heads = rotated + (a.v_out != nullptr ? s.n_kv_head : 0);
  const bool active = c < half;
  const T* x = a.qkv + t * (rotated + s.n_kv_head) * s.d_head + c;
  Raw<T, 8> lo[kHeads] = {}, hi[kHeads] = {};
#pragma unroll
  for (int j = 0; j < kHeads; j++) {
    const int h = head0 + j * kGroups;
    if (active && h < heads) lo[j].load(x + h * s.d_head), hi[j].load(x + h * s.d_head + half);
  }
  float cos[8] = {}, sin[8] = {};
  if (active) {
    const int64_t at = static_cast<int64_t>(s.positions[t]) * half + c;
    load(cos, s.cos + at), load(sin, s.sin + at);
  }
#pragma unroll
  for (int j = 0; j < kHeads; j++) {
    const int h = head0 + j * kGroups;
    float u[8], v[8];
    lo[j].get(u), hi[j].get(v);
    const T* w = h < s.n_head ? a.q_weight : a.k_weight;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += u[i] * u[i] + v[i] * v[i];
    sum = warp_sum<G>(sum);
    if (!active || h >= heads) continue;
    T* out = head_out(a, s, t, h) + c;
    if (h >= rotated) {
      lo[j].store(out), hi[j].store(out + half);
      continue;
    }
    if (w != nullptr) {
      const float r = __frsqrt_rn(sum / static_cast<float>(s.d_head) + s.eps);
      float wu[8], wv[8];
      load(wu, w + c), load(wv, w + c + half);
#pragma unroll
      for (int i = 0; i < 8; i++) u[i] = u[i] * r * wu[i], v[i] = v[i] * r * wv[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
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
template <class T, int G, int kHeads, bool kNorm>
__global__ void __launch_bounds__(kWarps * 32, 2) bwd_kernel(BwdArgs<T> a, RopeShape s) {
  constexpr int kGroups = 32 / G;
  __shared__ __align__(16) float sums[kWarps][kNorm ? G * 16 : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / G, half = s.d_head / 2, c = lane % G * 8;
  const bool active = c < half, keys = static_cast<int>(blockIdx.x) >= a.q_blocks;
  const int block = keys ? blockIdx.x - a.q_blocks : blockIdx.x, blocks = keys ? gridDim.x - a.q_blocks : a.q_blocks;
  const int heads = keys ? s.n_kv_head : s.n_head;
  const int64_t first = (keys ? s.n_head * s.d_head : 0) + c,
                width = static_cast<int64_t>(s.n_head + 2 * s.n_kv_head) * s.d_head;
  const T* w = keys ? a.k_weight : a.q_weight;
  Raw<T, 8> w_lo = {}, w_hi = {};
  if (kNorm && active) w_lo.load(w + c), w_hi.load(w + c + half);
  float dw_lo[8] = {}, dw_hi[8] = {};
  for (int64_t t = static_cast<int64_t>(block) * kWarps + warp; t < s.n; t += static_cast<int64_t>(blocks) * kWarps) {
    float cos[8] = {}, sin[8] = {};
    if (active) {
      const int64_t at = static_cast<int64_t>(s.positions[t]) * half + c;
      load(cos, s.cos + at), load(sin, s.sin + at);
    }
    for (int head0 = group; head0 - group < heads; head0 += kHeads * kGroups) {
      Raw<T, 8> d_lo[kHeads] = {}, d_hi[kHeads] = {}, x_lo[kHeads] = {}, x_hi[kHeads] = {};
#pragma unroll
      for (int j = 0; j < kHeads; j++) {
        const int h = head0 + j * kGroups;
        const int64_t at = t * width + first + h * s.d_head;
        if (!active || h >= heads) continue;
        d_lo[j].load(a.dqkv + at), d_hi[j].load(a.dqkv + at + half);
        if (kNorm) x_lo[j].load(a.qkv + at), x_hi[j].load(a.qkv + at + half);
      }
#pragma unroll
      for (int j = 0; j < kHeads; j++) {
        const int h = head0 + j * kGroups;
        float u[8], v[8];  // the gradient before the rotation
        d_lo[j].get(u), d_hi[j].get(v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float g = u[i] * cos[i] + v[i] * sin[i];
          v[i] = v[i] * cos[i] - u[i] * sin[i];
          u[i] = g;
        }
        if constexpr (kNorm) {
          float x[8], y[8], wx[8], wy[8];
          w_lo.forget(), w_hi.forget();
          x_lo[j].get(x), x_hi[j].get(y), w_lo.get(wx), w_hi.get(wy);
          float square = 0, inner = 0;
#pragma unroll
          for (int i = 0; i < 8; i++) {
            square += x[i] * x[i] + y[i] * y[i];
            inner += u[i] * wx[i] * x[i] + v[i] * wy[i] * y[i];
          }
          square = warp_sum<G>(square), inner = warp_sum<G>(inner);
          const float r = __frsqrt_rn(square / static_cast<float>(s.d_head) + s.eps);
          const float m = inner * r / static_cast<float>(s.d_head);
          x_lo[j].forget(), x_hi[j].forget(), w_lo.forget(), w_hi.forget();
          x_lo[j].get(x), x_hi[j].get(y), w_lo.get(wx), w_hi.get(wy);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const float xhat = x[i] * r, yhat = y[i] * r;
            dw_lo[i] += u[i] * xhat, dw_hi[i] += v[i] * yhat;
            u[i] = r * (u[i] * wx[i] - xhat * m), v[i] = r * (v[i] * wy[i] - yhat * m);
          }
        }
        if (!active || h >= heads) continue;
        T* out = a.dqkv + t * width + first + h * s.d_head;
        store(out, u), store(out + half, v);
      }
    }
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int distance = G; distance < 32; distance *= 2) {
        dw_lo[i] += __shfl_xor_sync(0xffffffffu, dw_lo[i], distance);
        dw_hi[i] += __shfl_xor_sync(0xffffffffu, dw_hi[i], distance);
      }
    }
    if (active && group == 0) store(&sums[warp][c], dw_lo);
    if (active && group == 0) store(&sums[warp][G * 8 + c], dw_hi);
    __syncthreads();
    for (int i = threadIdx.x; i < s.d_head; i += kWarps * 32) {
      const int at = i < half ? i : G * 8 + i - half;
      float sum = sums[0][at];
#pragma unroll
      for (int k = 1; k < kWarps; k++) sum += sums[k][at];
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
// f(integral constant G) for the lanes that half a head takes; false when no G fits.
template <class F>
bool with_lanes(int d_head, F&& f) {
  const int packs = d_head / 2 / 8;
  if (d_head % 16 != 0 || packs > 16) return false;
  if (packs == 1) f(std::integral_constant<int, 1>{});
  else if (packs == 2) f(std::integral_constant<int, 2>{});
  else if (packs <= 4) f(std::integral_constant<int, 4>{});
  else if (packs <= 8) f(std::integral_constant<int, 8>{});
  else f(std::integral_constant<int, 16>{});
  return true;
}

RopeShape shape(const NormRope& a) { return {a.cos, a.sin, a.positions, a.eps, a.n, a.n_head, a.n_kv_head, a.d_head}; }

// Heads of one token that a lane group takes: all of them where 4 a group are enough.
constexpr int kFwdHeads = 4, kBwdHeads = 2, kBwdBlocksPerSm = 2;

template <class T, int kHeads = kFwdHeads>
void fwd(const Context& ctx, const FwdArgs<T>& f, const RopeShape& s) {
  const int heads = s.n_head + (f.v_out != nullptr ? 2 : 1) * s.n_kv_head;
  const bool vectors = aligned({f.q_out, f.k_out, f.v_out, f.qkv, f.q_weight, f.k_weight, s.cos, s.sin}) &&
                       f.ldk % 8 == 0 && (f.v_out == nullptr || f.ldv % 8 == 0);
  const bool done =
      vectors && with_lanes(s.d_head, [&](auto lanes) {
        const int parts = static_cast<int>(div_up(heads, kHeads * (32 / lanes.value)));
        const int warps = s.n * parts <= ctx.n_sm ? 1 : kWarps;
        fwd_kernel<T, lanes.value, kHeads>
            <<<static_cast<unsigned>(div_up(s.n * parts, warps)), warps * 32, 0, ctx.stream>>>(f, s, parts);
      });
  if (!done) fwd_any<T><<<static_cast<unsigned>(div_up(s.n * heads, kWarps)), kWarps * 32, 0, ctx.stream>>>(f, s);
  MM_CUDA_LAUNCHED();
}

template <class T, int kHeads = kBwdHeads>
void bwd(const Context& ctx, float* dq_weight, float* dk_weight, BwdArgs<T> b, const RopeShape& s,
         int per_sm = kBwdBlocksPerSm) {
  const bool vectors = aligned({b.dqkv, b.qkv, b.q_weight, b.k_weight, s.cos, s.sin});
  // Blocks in proportion to the heads, at least one for each kind, no more than there are tokens for.
  const int64_t most = div_up(s.n * (vectors ? 1 : s.n_kv_head), kWarps), resident = int64_t{per_sm} * ctx.n_sm;
  const int64_t q_share = std::max<int64_t>(1, resident * s.n_head / (s.n_head + s.n_kv_head));
  b.q_blocks = static_cast<int>(std::min(div_up(s.n * (vectors ? 1 : s.n_head), kWarps), q_share));
  const int k_blocks = static_cast<int>(std::min(most, std::max<int64_t>(1, resident - q_share)));
  const unsigned blocks = static_cast<unsigned>(b.q_blocks + k_blocks);
  const bool norm = b.q_weight != nullptr;
  Scratch scratch(ctx);
  b.partial = norm ? scratch.take<float>(static_cast<size_t>(blocks) * static_cast<size_t>(s.d_head)) : nullptr;
  const bool done = vectors && with_lanes(s.d_head, [&](auto lanes) {
                      if (norm) bwd_kernel<T, lanes.value, kHeads, true><<<blocks, kWarps * 32, 0, ctx.stream>>>(b, s);
                      else bwd_kernel<T, lanes.value, 2 * kHeads, false><<<blocks, kWarps * 32, 0, ctx.stream>>>(b, s);
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
