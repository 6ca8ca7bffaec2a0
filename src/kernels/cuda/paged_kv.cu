// Keys and values in pages: written behind RMSNorm of every head (optional) and rotary embedding as in rope.cu, copied,
// collected.
//
//   u = x rstd w (or x),  y[i] = u[i] cos - u[i + half] sin,  y[i + half] = u[i + half] cos + u[i] sin
//   i8: scale = absmax / 127 of a (row, head), data = round(y / scale); NaN and infinity end in the scale
//
// paged_norm_rope: G lanes own a head of a token, 8 pairs (i, i + half) a lane (G = 6 for heads of 96: five heads in 30
// lanes of a warp); queries, keys and values alike, values pass unchanged. In a decode step the time is that of a
// launch and three dependent reads. Other head widths or addresses take one warp a head and plain loops.
//
// Bytes: n (H + 2 K) d_head (sizeof(T) + that of the format).
//
// H100, H8/4 d96, bf16 / int8 (us): 1 to 96 tokens 1.9 to 2.1 / 2.1 to 2.4, 512 2.6 / 2.9, 8,192 25 / 26 (1.7 TB/s).
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"

namespace mm::cuda {
namespace {

// C: the element type of keys and values: float, bf16, f16 or int8_t.
template <class F>
void dispatch_kv(KvFormat f, F&& call) {
  switch (f) {
    case KvFormat::f32: return call(float{});
    case KvFormat::bf16: return call(bf16{});
    case KvFormat::f16: return call(f16{});
    case KvFormat::i8: return call(int8_t{});
  }
}

__device__ __forceinline__ int32_t quantize(float x, float inverse) {
  return max(-127, min(127, __float2int_rn(x * inverse)));
}
// Of a scale: 0 where all is zero, and where it is not finite (then the scale says so).
__device__ __forceinline__ float inverse_of(float scale) {
  return scale > 0.0f && scale < INFINITY ? 1.0f / scale : 0.0f;
}

template <class C, int V>
__device__ __forceinline__ void store_kv(C* to, const float (&x)[V], float inverse) {
  if constexpr (std::is_same_v<C, int8_t>) {
    static_assert(V == 8);
    uint32_t w[2] = {};
#pragma unroll
    for (int i = 0; i < V; i++) w[i / 4] |= (static_cast<uint32_t>(quantize(x[i], inverse)) & 0xffu) << (i % 4 * 8);
    *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
  } else {
    store(to, x);
  }
}

struct Shape {
  const float *cos, *sin;
  const int32_t *positions, *slots;
  float eps;
  int64_t n;
  int n_head, n_kv_head, d_head;
};
template <class T, class C>
struct Rows {
  const T *qkv, *q_weight, *k_weight;
  T *q_out, *k_out, *v_out;
  C *k, *v;
  float *k_scale, *v_scale;
};

// G lanes from `first` on.
template <int G>
__device__ __forceinline__ float group_sum(float x, int first) {
  float sum = __shfl_sync(0xffffffffu, x, first);
#pragma unroll
  for (int i = 1; i < G; i++) sum += __shfl_sync(0xffffffffu, x, first + i);
  return sum;
}
template <int G>
__device__ __forceinline__ float group_max(float x, int first) {
  float max = __shfl_sync(0xffffffffu, x, first);
#pragma unroll
  for (int i = 1; i < G; i++) max = max_nan(max, __shfl_sync(0xffffffffu, x, first + i));
  return max;
}

constexpr int kWarps = 4;

template <class T, class C, int G>
__global__ void __launch_bounds__(kWarps * 32) norm_rope_kernel(Rows<T, C> a, Shape s) {
  constexpr int V = 8, groups = 32 / G, half = G * V;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / G, first = group < groups ? group * G : 0;
  const unsigned heads = static_cast<unsigned>(s.n_head + 2 * s.n_kv_head),
                 item = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * groups + static_cast<unsigned>(group),
                 t = item / heads;
  const int h = static_cast<int>(item - t * heads), c = (lane - group * G) * V;
  const bool on = group < groups && t < s.n;
  const bool rotated = h < s.n_head + s.n_kv_head, query = h < s.n_head;
  const T* w = query ? a.q_weight : rotated ? a.k_weight : nullptr;
  Raw<T, V> lo = {}, hi = {};
  float u[V], v[V], cos[V] = {}, sin[V] = {}, wu[V] = {}, wv[V] = {};
  int slot = -1;
  let_next_begin();
  if (on) {  // what no kernel of the step writes
    if (!query) slot = s.slots[t];
    if (w != nullptr) load(wu, w + c), load(wv, w + c + half);
    if (rotated) {
      const int64_t at = static_cast<int64_t>(s.positions[t]) * half + c;
      load(cos, s.cos + at), load(sin, s.sin + at);
    }
  }
  wait_for_previous();
  if (on) {
    const T* x = a.qkv + (static_cast<int64_t>(t) * heads + h) * s.d_head + c;
    lo.load(x), hi.load(x + half);
  }
  lo.get(u), hi.get(v);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; i++) sum += u[i] * u[i] + v[i] * v[i];
  sum = group_sum<G>(sum, first);
  if (w != nullptr) {
    const float r = __frsqrt_rn(sum * (1.0f / static_cast<float>(2 * half)) + s.eps);
#pragma unroll
    for (int i = 0; i < V; i++) u[i] = u[i] * r * wu[i], v[i] = v[i] * r * wv[i];
  }
  if (rotated) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float y = u[i] * cos[i] - v[i] * sin[i];
      v[i] = v[i] * cos[i] + u[i] * sin[i];
      u[i] = y;
    }
  }
  float inverse = 0, scale = 0;
  if constexpr (std::is_same_v<C, int8_t>) {
    float absmax = 0;
#pragma unroll
    for (int i = 0; i < V; i++) absmax = max_nan(absmax, max_nan(fabsf(u[i]), fabsf(v[i])));
    scale = group_max<G>(absmax, first) / 127.0f;
    inverse = inverse_of(scale);
  }
  if (!on) return;
  if (query) {
    T* to = a.q_out + (static_cast<int64_t>(t) * s.n_head + h) * s.d_head + c;
    store(to, u), store(to + half, v);
    return;
  }
  const int kv_head = rotated ? h - s.n_head : h - s.n_head - s.n_kv_head;
  if (T* copy = rotated ? a.k_out : a.v_out; copy != nullptr) {
    copy += (static_cast<int64_t>(t) * s.n_kv_head + kv_head) * s.d_head + c;
    store(copy, u), store(copy + half, v);
  }
  if (slot < 0) return;
  const int64_t row_head = static_cast<int64_t>(slot) * s.n_kv_head + kv_head;
  C* to = (rotated ? a.k : a.v) + row_head * s.d_head + c;
  store_kv(to, u, inverse), store_kv(to + half, v, inverse);
  if (std::is_same_v<C, int8_t> && c == 0) (rotated ? a.k_scale : a.v_scale)[row_head] = scale;
}

// Any even head width, any alignment: a warp a head, which reads its elements again for every step.
template <class T, class C>
__global__ void __launch_bounds__(kWarps * 32) norm_rope_any(Rows<T, C> a, Shape s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, half = s.d_head / 2, heads = s.n_head + 2 * s.n_kv_head;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = item / heads;
  if (t >= s.n) return;
  const int h = static_cast<int>(item % heads);
  const bool rotated = h < s.n_head + s.n_kv_head, query = h < s.n_head;
  const T *x = a.qkv + item * s.d_head, *w = query ? a.q_weight : rotated ? a.k_weight : nullptr;
  float r = 1;
  if (w != nullptr) {
    float sum = 0;
    for (int i = lane; i < s.d_head; i += 32) sum += to_float(x[i]) * to_float(x[i]);
    r = __frsqrt_rn(warp_sum(sum) / static_cast<float>(s.d_head) + s.eps);
  }
  const float *cos = s.cos + static_cast<int64_t>(s.positions[t]) * half,
              *sin = s.sin + static_cast<int64_t>(s.positions[t]) * half;
  const auto value = [&](int i) {
    const auto normed = [&](int j) { return to_float(x[j]) * r * (w != nullptr ? to_float(w[j]) : 1.0f); };
    if (!rotated) return to_float(x[i]);
    return i < half ? normed(i) * cos[i] - normed(i + half) * sin[i]
                    : normed(i) * cos[i - half] + normed(i - half) * sin[i - half];
  };
  T* copy = query ? a.q_out + (t * s.n_head + h) * s.d_head : rotated ? a.k_out : a.v_out;
  const int kv_head = query ? 0 : rotated ? h - s.n_head : h - s.n_head - s.n_kv_head;
  if (!query && copy != nullptr) copy += (t * s.n_kv_head + kv_head) * s.d_head;
  if (copy != nullptr) {
    for (int i = lane; i < s.d_head; i += 32) copy[i] = from_float<T>(value(i));
  }
  const int slot = query ? -1 : s.slots[t];
  if (slot < 0) return;
  const int64_t row_head = static_cast<int64_t>(slot) * s.n_kv_head + kv_head;
  C* to = (rotated ? a.k : a.v) + row_head * s.d_head;
  if constexpr (std::is_same_v<C, int8_t>) {
    float absmax = 0;
    for (int i = lane; i < s.d_head; i += 32) absmax = max_nan(absmax, fabsf(value(i)));
    const float scale = warp_max(absmax) / 127.0f, inverse = inverse_of(scale);
    for (int i = lane; i < s.d_head; i += 32) to[i] = static_cast<int8_t>(quantize(value(i), inverse));
    if (lane == 0) (rotated ? a.k_scale : a.v_scale)[row_head] = scale;
  } else {
    for (int i = lane; i < s.d_head; i += 32) to[i] = from_float<C>(value(i));
  }
}

// --- collecting and copying ---------------------------------------------------------------------------------------
struct Gather {
  const int32_t *start, *table;
  int64_t table_ld, n_rows;
  int block_shift, n_seq, n_kv_head, d_head;
};

// V elements a thread.
template <class T, class C, int V>
__global__ void __launch_bounds__(256)
    gather_kernel(T* k_out, T* v_out, const C* k, const C* v, const float* k_scale, const float* v_scale, Gather g) {
  const int width = g.n_kv_head * g.d_head, packs = width / V;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = at / packs;
  if (row >= g.n_rows || row >= g.start[g.n_seq]) return;
  const int c = static_cast<int>(at - row * packs) * V;
  int s = 0, end = g.n_seq;  // start[s] <= row < start[end]
  while (end - s > 1) {
    const int middle = (s + end) / 2;
    if (g.start[middle] <= row) s = middle;
    else end = middle;
  }
  const int key = static_cast<int>(row) - g.start[s];
  const int64_t from = static_cast<int64_t>(g.table[s * g.table_ld + (key >> g.block_shift)]) +
                       (key & ((int64_t{1} << g.block_shift) - 1));
  float x[V], y[V];
  if constexpr (std::is_same_v<C, int8_t>) {
    const int64_t head = from * g.n_kv_head + c / g.d_head;
    const float ks = k_scale[head], vs = v_scale[head];
    int8_t a[V], b[V];
    if constexpr (V == 8) {
      *reinterpret_cast<uint2*>(a) = *reinterpret_cast<const uint2*>(k + from * width + c);
      *reinterpret_cast<uint2*>(b) = *reinterpret_cast<const uint2*>(v + from * width + c);
    } else {
      a[0] = k[from * width + c], b[0] = v[from * width + c];
    }
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = static_cast<float>(a[i]) * ks, y[i] = static_cast<float>(b[i]) * vs;
  } else {
    load(x, k + from * width + c), load(y, v + from * width + c);
  }
  store(k_out + row * width + c, x), store(v_out + row * width + c, y);
}

struct Copies {
  const int32_t *from, *to, *count;
};

// Units of type W; grid: x = units of a copy, y = copy, z = layer and which of the arrays.
template <class W>
__global__ void __launch_bounds__(256) copy_rows_kernel(W* a, W* b, int64_t layer_units, int row_units, Copies c) {
  W* data = (blockIdx.z & 1 ? b : a) + (blockIdx.z >> 1) * layer_units;
  const int64_t units = static_cast<int64_t>(c.count[blockIdx.y]) * row_units;
  const W* from = data + static_cast<int64_t>(c.from[blockIdx.y]) * row_units;
  W* to = data + static_cast<int64_t>(c.to[blockIdx.y]) * row_units;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < units;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    to[i] = from[i];
}

template <class W>
void copy_rows(const Context& ctx, void* a, void* b, int64_t layer_bytes, int64_t row_bytes, const Copies& c,
               int64_t n_layer, int64_t n_copies, int64_t max_count) {
  const int64_t row_units = row_bytes / static_cast<int64_t>(sizeof(W)),
                blocks = std::min<int64_t>(div_up(max_count * row_units, 256), 64);
  for (int64_t first = 0; first < n_copies; first += 65535) {
    const int64_t n = std::min<int64_t>(n_copies - first, 65535);
    copy_rows_kernel<W>
        <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(n), static_cast<unsigned>(2 * n_layer)), 256, 0,
           ctx.stream>>>(static_cast<W*>(a), static_cast<W*>(b), layer_bytes / static_cast<int64_t>(sizeof(W)),
                         static_cast<int>(row_units), {c.from + first, c.to + first, c.count + first});
    MM_CUDA_LAUNCHED();
  }
}

}  // namespace

void paged_norm_rope(const Context& ctx, DType t, void* q_out, const KvLayer& kv, void* k_out, void* v_out,
                     const int32_t* slots, const void* qkv, const NormRope& r) {
  if (r.n == 0) return;
  const Shape s = {r.cos, r.sin, r.positions, slots, r.eps, r.n, r.n_head, r.n_kv_head, r.d_head};
  dispatch(t, [&]<class T>(T) {
    dispatch_kv(kv.format, [&]<class C>(C) {
      const Rows<T, C> a = {static_cast<const T*>(qkv),
                            static_cast<const T*>(r.q_weight),
                            static_cast<const T*>(r.k_weight),
                            static_cast<T*>(q_out),
                            static_cast<T*>(k_out),
                            static_cast<T*>(v_out),
                            static_cast<C*>(kv.k),
                            static_cast<C*>(kv.v),
                            kv.k_scale,
                            kv.v_scale};
      const int64_t heads = r.n * (r.n_head + 2 * r.n_kv_head);
      const auto launch = [&](auto lanes) {
        constexpr int G = lanes.value;
        const int64_t warps = div_up(heads, 32 / G), per_block = warps <= 4 * ctx.n_sm ? 1 : kWarps;
        norm_rope_kernel<T, C, G>
            <<<static_cast<unsigned>(div_up(warps, per_block)), static_cast<unsigned>(per_block * 32), 0, ctx.stream>>>(
                a, s);
      };
      if (aligned({q_out, k_out, v_out, qkv, r.q_weight, r.k_weight, r.cos, r.sin, kv.k, kv.v}) &&
          heads < (int64_t{1} << 31)) {
        switch (r.d_head) {
          case 32: return launch(std::integral_constant<int, 2>{});
          case 64: return launch(std::integral_constant<int, 4>{});
          case 96: return launch(std::integral_constant<int, 6>{});
          case 128: return launch(std::integral_constant<int, 8>{});
          default: break;
        }
      }
      norm_rope_any<T, C><<<static_cast<unsigned>(div_up(heads, kWarps)), kWarps * 32, 0, ctx.stream>>>(a, s);
    });
  });
  MM_CUDA_LAUNCHED();
}

void kv_gather(const Context& ctx, DType t, void* k_out, void* v_out, const KvLayer& kv, const int32_t* start,
               const int32_t* table, int64_t table_ld, int block_shift, int64_t n_seq, int64_t n_rows, int n_kv_head,
               int d_head) {
  if (n_rows == 0 || n_seq == 0) return;
  const Gather g = {start, table, table_ld, n_rows, block_shift, static_cast<int>(n_seq), n_kv_head, d_head};
  dispatch(t, [&]<class T>(T) {
    dispatch_kv(kv.format, [&]<class C>(C) {
      const auto launch = [&](auto width) {
        constexpr int V = width.value;
        const int64_t packs = n_rows * n_kv_head * d_head / V;
        gather_kernel<T, C, V><<<static_cast<unsigned>(div_up(packs, 256)), 256, 0, ctx.stream>>>(
            static_cast<T*>(k_out), static_cast<T*>(v_out), static_cast<const C*>(kv.k), static_cast<const C*>(kv.v),
            kv.k_scale, kv.v_scale, g);
      };
      if (d_head % 8 == 0 && aligned({k_out, v_out, kv.k, kv.v})) launch(std::integral_constant<int, 8>{});
      else launch(std::integral_constant<int, 1>{});
    });
  });
  MM_CUDA_LAUNCHED();
}

void kv_copy_rows(const Context& ctx, const InferKv& kv, int64_t n_layer, const int32_t* from, const int32_t* to,
                  const int32_t* count, int64_t n_copies, int64_t max_count, int n_kv_head, int d_head) {
  if (n_copies == 0 || max_count == 0 || n_layer == 0) return;
  const Copies c = {from, to, count};
  dispatch_kv(kv.format, [&]<class C>(C) {
    const int64_t row = int64_t{n_kv_head} * d_head * static_cast<int64_t>(sizeof(C)),
                  layer = kv.layer_stride * static_cast<int64_t>(sizeof(C));
    if (row % 16 == 0 && layer % 16 == 0 && aligned({kv.k, kv.v}))
      copy_rows<uint4>(ctx, kv.k, kv.v, layer, row, c, n_layer, n_copies, max_count);
    else copy_rows<C>(ctx, kv.k, kv.v, layer, row, c, n_layer, n_copies, max_count);
  });
  if (kv.format == KvFormat::i8) {
    constexpr int64_t f = sizeof(float);
    copy_rows<float>(ctx, kv.k_scale, kv.v_scale, kv.layer_stride / d_head * f, n_kv_head * f, c, n_layer, n_copies,
                     max_count);
  }
}

}  // namespace mm::cuda
