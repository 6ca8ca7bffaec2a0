// RMSNorm of every head (optional) and rotary embedding, forward and backward:
//   u = x rstd w (or x),  y[i] = u[i] cos - u[i + half] sin,  y[i + half] = u[i + half] cos + u[i] sin.
//
// Memory-bound, but the arithmetic must be kept small: G lanes own a head, 8 pairs a lane (G = 6 for heads of 96: five
// heads in 30 lanes of a warp), and a lane group takes U heads of one token, so that cos, sin and the weights are
// loaded once for them. The groups are dealt out over tokens and heads without gaps; blocks take queries, keys or
// (forward) copies of values, never two of them:
//
//   one head of 96   |lane 0: 0..7|1: 8..15|..|5: 40..47|lane 0: 48..55|1: 56..63|..|5: 88..95|
//   queries, U = 2   group 0: token 0, heads 0 and 4; group 1: token 0, heads 1 and 5; ... group 4: token 1, heads 0, 4
//
// Backward works in place, so it walks the heads with a grid that fits the machine at once. Each lane sums the weights'
// gradients of its columns, blocks leave a row of partial sums each. Head widths or addresses that do not allow 16-byte
// accesses take one warp a head and plain loops.
//
// Bytes: forward 2 n (H + 2 K) d_head sizeof(T), backward 3 n (H + K) d_head sizeof(T).
//
// H100, bf16, % of a copy of 3.0 TB/s (each figure includes 2 us of launch), forward and backward: 24576 tokens with 8
// and 4 heads of 96 57 us (89 %) and 71 us (80 %; 60.5 us without add_column_sums and launches), 65536 with 8 and 2 of
// 64 73 us (93 %) and 98 us (86 %), 24576 with 16 and 8 of 128 141 us (96 %) and 174 us (88 %); forward of 1 to 64
// tokens 2.1 us.
//
// Slower, heads of 96: 4 elements a lane 73 and 80 us (the instructions then take 77 % of the issue slots), heads of
// queries, keys and values in one warp 62 us (a division and a choice of weights for each head), groups of 8 lanes, two
// of them idle, 61 and 77 us, a warp for all heads of a token 63 and 108 us (few keys: most groups idle).
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

// x / d for x below 2^31: a multiplication where the machine would take twenty instructions.
struct Divisor {
  unsigned d = 1, factor = 0, shift = 0;
  Divisor() = default;
  explicit Divisor(int64_t by) : d(static_cast<unsigned>(by)) {
    while ((uint64_t{1} << shift) < d) shift++;
    factor = static_cast<unsigned>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ unsigned divide(unsigned x) const { return (__umulhi(x, factor) + x) >> shift; }
};

// Blocks [0, q_end) take queries, [q_end, k_end) keys, the others values. A group takes heads h, h + q_step.d, ...
struct Parts {
  unsigned q_end = 0, k_end = 0;
  Divisor q_step, k_step, v_packs;  // v_packs: packs of a token's values
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
constexpr int kCopies = 2;  // packs of values a thread

template <class T, int V>
__device__ void copy_values(const FwdArgs<T>& a, const RopeShape& s, const Parts& parts) {
  const unsigned packs = static_cast<unsigned>(s.n) * parts.v_packs.d,
                 first = (blockIdx.x - parts.k_end) * blockDim.x * kCopies + threadIdx.x;
  const int64_t column = static_cast<int64_t>(s.n_head + s.n_kv_head) * s.d_head,
                width = column + static_cast<int64_t>(s.n_kv_head) * s.d_head;
  Raw<T, V> x[kCopies] = {};
#pragma unroll
  for (int j = 0; j < kCopies; j++) {
    const unsigned i = first + j * blockDim.x, t = parts.v_packs.divide(i), c = i - t * parts.v_packs.d;
    if (i < packs) x[j].load(a.qkv + t * width + column + c * V);
  }
#pragma unroll
  for (int j = 0; j < kCopies; j++) {
    const unsigned i = first + j * blockDim.x, t = parts.v_packs.divide(i), c = i - t * parts.v_packs.d;
    if (i < packs) x[j].store(a.v_out + (a.slots != nullptr ? a.slots[t] : t) * a.ldv + c * V);
  }
}

template <class T, int V, int G, int U, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) fwd_kernel(FwdArgs<T> a, RopeShape s, Parts parts) {
  if (blockIdx.x >= parts.k_end) return copy_values<T, V>(a, s, parts);
  constexpr int kGroups = 32 / G;
  const bool keys = blockIdx.x >= parts.q_end;
  const Divisor step = keys ? parts.k_step : parts.q_step;
  const int lane = threadIdx.x % 32, group = lane / G, half = s.d_head / 2, c = (lane - group * G) * V,
            heads = keys ? s.n_kv_head : s.n_head;
  const unsigned item =
      ((blockIdx.x - (keys ? parts.q_end : 0)) * (blockDim.x / 32) + threadIdx.x / 32) * kGroups + group;
  const unsigned t = step.divide(item);
  const int head = static_cast<int>(item - t * step.d);
  const bool on = group < kGroups && c < half && t < s.n;
  const T* x = a.qkv + t * static_cast<int64_t>((s.n_head + 2 * s.n_kv_head) * s.d_head) +
               (keys ? s.n_head + head : head) * s.d_head + c;
  const int64_t head_step = static_cast<int64_t>(step.d) * s.d_head;
  Raw<T, V> lo[U] = {}, hi[U] = {}, w_lo = {}, w_hi = {};
#pragma unroll
  for (int j = 0; j < U; j++) {
    if (on && head + j * static_cast<int>(step.d) < heads)
      lo[j].load(x + j * head_step), hi[j].load(x + j * head_step + half);
  }
  const T* w = keys ? a.k_weight : a.q_weight;
  float cos[V] = {}, sin[V] = {};
  T* out = nullptr;
  if (on) {
    if (w != nullptr) w_lo.load(w + c), w_hi.load(w + c + half);
    const int64_t at = static_cast<int64_t>(s.positions[t]) * half + c;
    load(cos, s.cos + at), load(sin, s.sin + at);
    if (keys) out = a.k_out + (a.slots != nullptr ? a.slots[t] : t) * a.ldk;
    else out = a.q_out + t * static_cast<int64_t>(s.n_head * s.d_head);
    out += head * s.d_head + c;
  }
  const float inverse = 1.0f / static_cast<float>(s.d_head);
#pragma unroll
  for (int j = 0; j < U; j++) {
    float u[V], v[V];
    lo[j].get(u), hi[j].get(v);
    if (w != nullptr) {
      float sum = 0, wu[V], wv[V];
#pragma unroll
      for (int i = 0; i < V; i++) sum += u[i] * u[i] + v[i] * v[i];
      const float r = __frsqrt_rn(group_sum<G>(sum, group * G) * inverse + s.eps);
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
    if (on && head + j * static_cast<int>(step.d) < heads)
      store(out + j * head_step, u), store(out + j * head_step + half, v);
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
__global__ void __launch_bounds__(kWarps * 32, kBlocks) bwd_kernel(BwdArgs<T> a, RopeShape s, Parts parts) {
  constexpr int kGroups = 32 / G;
  __shared__ __align__(16) float sums[kNorm ? kWarps * kGroups : 1][G * 2 * V];
  const bool keys = blockIdx.x >= parts.q_end;
  const Divisor step = keys ? parts.k_step : parts.q_step;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / G, half = s.d_head / 2,
            c = (lane - group * G) * V, heads = keys ? s.n_kv_head : s.n_head;
  const bool active = group < kGroups && c < half;
  const unsigned block = blockIdx.x - (keys ? parts.q_end : 0), blocks = keys ? parts.k_end - parts.q_end : parts.q_end,
                 items = static_cast<unsigned>(s.n) * step.d;
  const int64_t width = static_cast<int64_t>(s.n_head + 2 * s.n_kv_head) * s.d_head,
                column = (keys ? s.n_head * s.d_head : 0) + c, head_step = static_cast<int64_t>(step.d) * s.d_head;
  const T* w = keys ? a.k_weight : a.q_weight;
  const float inverse = 1.0f / static_cast<float>(s.d_head);
  Raw<T, V> w_lo = {}, w_hi = {};
  if (kNorm && active) w_lo.load(w + c), w_hi.load(w + c + half);
  float dw_lo[V] = {}, dw_hi[V] = {};
  for (unsigned base = (block * kWarps + warp) * kGroups; base < items; base += blocks * kWarps * kGroups) {
    const unsigned item = base + group, t = step.divide(item);
    const int head = static_cast<int>(item - t * step.d);
    const bool on = active && item < items;
    const int64_t at = t * width + column + head * s.d_head;
    Raw<T, V> d_lo[U] = {}, d_hi[U] = {}, x_lo[U] = {}, x_hi[U] = {};
#pragma unroll
    for (int j = 0; j < U; j++) {
      if (!on || head + j * static_cast<int>(step.d) >= heads) continue;
      d_lo[j].load(a.dqkv + at + j * head_step), d_hi[j].load(a.dqkv + at + j * head_step + half);
      if (kNorm) x_lo[j].load(a.qkv + at + j * head_step), x_hi[j].load(a.qkv + at + j * head_step + half);
    }
    const int64_t row = on ? static_cast<int64_t>(s.positions[t]) * half + c : 0;
#pragma unroll
    for (int j = 0; j < U; j++) {
      float cos[V] = {}, sin[V] = {};  // loaded again for the second head: registers are scarcer than L1
      if (on) load(cos, s.cos + row), load(sin, s.sin + row);
      float u[V], v[V];  // the gradient before the rotation
      d_lo[j].get(u), d_hi[j].get(v);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float g = u[i] * cos[i] + v[i] * sin[i];
        v[i] = v[i] * cos[i] - u[i] * sin[i];
        u[i] = g;
      }
      if constexpr (kNorm) {
        float x[V], y[V], wx[V], wy[V], square = 0, inner = 0;
        w_lo.forget(), w_hi.forget();
        x_lo[j].get(x), x_hi[j].get(y), w_lo.get(wx), w_hi.get(wy);
#pragma unroll
        for (int i = 0; i < V; i++) {
          square += x[i] * x[i] + y[i] * y[i];
          wx[i] *= u[i], wy[i] *= v[i];
          inner += wx[i] * x[i] + wy[i] * y[i];
        }
        square = group_sum<G>(square, group * G), inner = group_sum<G>(inner, group * G);
        const float r = __frsqrt_rn(square * inverse + s.eps), m = inner * inverse * r * r * r;
        x_lo[j].forget(), x_hi[j].forget();
        x_lo[j].get(x), x_hi[j].get(y);
#pragma unroll
        for (int i = 0; i < V; i++) {  // r w dy - x r^3 mean(w dy x)
          dw_lo[i] += u[i] * r * x[i], dw_hi[i] += v[i] * r * y[i];
          u[i] = r * wx[i] - x[i] * m, v[i] = r * wy[i] - y[i] * m;
        }
      }
      if (!on || head + j * static_cast<int>(step.d) >= heads) continue;
      T* out = a.dqkv + at + j * head_step;
      store(out, u), store(out + half, v);
    }
  }
  if constexpr (kNorm) {
    if (active) {
      store(&sums[warp * kGroups + group][c], dw_lo);
      store(&sums[warp * kGroups + group][G * V + c], dw_hi);
    }
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
__global__ void bwd_any(BwdArgs<T> a, RopeShape s, Parts parts) {
  extern __shared__ float sums[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = s.d_head / 2;
  const bool keys = blockIdx.x >= parts.q_end;
  const unsigned block = blockIdx.x - (keys ? parts.q_end : 0), blocks = keys ? parts.k_end - parts.q_end : parts.q_end;
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

// Heads of a token that a lane group takes, and blocks a multiprocessor.
constexpr int kHeads = 2, kFwdBlocksPerSm = 3, kBwdBlocksPerSm = 2;

template <class T, int U = kHeads, int kBlocks = kFwdBlocksPerSm>
void fwd(const Context& ctx, const FwdArgs<T>& f, const RopeShape& s) {
  constexpr int V = 8;
  const int64_t heads = s.n_head + (f.v_out != nullptr ? 2 : 1) * s.n_kv_head, items = s.n * heads;
  const bool vectors = aligned({f.q_out, f.k_out, f.v_out, f.qkv, f.q_weight, f.k_weight, s.cos, s.sin}) &&
                       f.ldk % 8 == 0 && (f.v_out == nullptr || f.ldv % 8 == 0) &&
                       items * s.d_head / V < (int64_t{1} << 31) - 4096;
  const bool done = vectors && with_lanes<V>(s.d_head, [&](auto lanes) {
                      Parts p;
                      p.q_step = Divisor(div_up(s.n_head, U)), p.k_step = Divisor(div_up(s.n_kv_head, U));
                      p.v_packs = Divisor(s.n_kv_head * s.d_head / V);
                      const int64_t q_warps = div_up(s.n * p.q_step.d, 32 / lanes.value),
                                    k_warps = div_up(s.n * p.k_step.d, 32 / lanes.value),
                                    v_packs = f.v_out != nullptr ? s.n * p.v_packs.d : 0,
                                    warps = q_warps <= ctx.n_sm ? 1 : kWarps;
                      p.q_end = static_cast<unsigned>(div_up(q_warps, warps));
                      p.k_end = p.q_end + static_cast<unsigned>(div_up(k_warps, warps));
                      const unsigned blocks = p.k_end + static_cast<unsigned>(div_up(v_packs, warps * 32 * kCopies));
                      fwd_kernel<T, V, lanes.value, U, kBlocks>
                          <<<blocks, static_cast<unsigned>(warps * 32), 0, ctx.stream>>>(f, s, p);
                    });
  if (!done) fwd_any<T><<<static_cast<unsigned>(div_up(items, kWarps)), kWarps * 32, 0, ctx.stream>>>(f, s);
  MM_CUDA_LAUNCHED();
}

template <class T, int U = kHeads, int kBlocks = kBwdBlocksPerSm>
void bwd(const Context& ctx, float* dq_weight, float* dk_weight, BwdArgs<T> b, const RopeShape& s) {
  constexpr int V = 8;
  const bool vectors =
      aligned({b.dqkv, b.qkv, b.q_weight, b.k_weight, s.cos, s.sin}) && s.n * s.n_head < (int64_t{1} << 31) - 1048576;
  // Blocks in proportion to the heads, at least one of each kind, no more than there are heads for.
  const int64_t q_step = div_up(s.n_head, U), k_step = div_up(s.n_kv_head, U), resident = int64_t{kBlocks} * ctx.n_sm,
                q_share = std::max<int64_t>(1, resident * q_step / (q_step + k_step)),
                k_share = std::max<int64_t>(1, resident - q_share);
  Parts p;
  p.q_step = Divisor(q_step), p.k_step = Divisor(k_step);
  p.q_end = static_cast<unsigned>(std::min(div_up(s.n * s.n_head, kWarps), q_share));
  p.k_end = p.q_end + static_cast<unsigned>(std::min(div_up(s.n * s.n_kv_head, kWarps), k_share));
  const bool norm = b.q_weight != nullptr;
  Scratch scratch(ctx);
  b.partial = norm ? scratch.take<float>(size_t{p.k_end} * static_cast<size_t>(s.d_head)) : nullptr;
  const bool done =
      vectors && with_lanes<V>(s.d_head, [&](auto lanes) {
        if (norm) bwd_kernel<T, V, lanes.value, U, true, kBlocks><<<p.k_end, kWarps * 32, 0, ctx.stream>>>(b, s, p);
        else bwd_kernel<T, V, lanes.value, U, false, kBlocks><<<p.k_end, kWarps * 32, 0, ctx.stream>>>(b, s, p);
      });
  if (!done) {
    const size_t bytes = static_cast<size_t>(kWarps * s.d_head) * sizeof(float);
    if (bytes > 48 * 1024) fail("rope backward", "heads wider than 1536 are not supported", __FILE__, __LINE__);
    bwd_any<T><<<p.k_end, kWarps * 32, bytes, ctx.stream>>>(b, s, p);
  }
  MM_CUDA_LAUNCHED();
  if (norm) {
    add_column_sums(
        ctx, {dq_weight, b.partial, static_cast<int>(p.q_end)},
        {dk_weight, b.partial + static_cast<int64_t>(p.q_end) * s.d_head, static_cast<int>(p.k_end - p.q_end)},
        s.d_head);
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
            static_cast<const T*>(a.k_weight)},
           shape(a));
  });
}

}  // namespace mm::cuda
