// y [m, n] = x [m, k] w^T (+ residual) with int8 weights in groups of 32 along k, each with one f16 scale.
//
// linear_kernel (bf16, f16): tensor cores, weights as the rows of mma.m16n8k16. A lane (4 g + m4) takes 8 bytes of rows
// g and g + 8 of a group, which are its fragments of two products in a permuted order of k; its 16 bytes of x at the
// same k are the fragments of a token. int8 becomes T exactly, a group's two products are summed on their own and added
// to the fp32 sums times the group's scale: no rounding but that of x.
//
//   block = 8 warps: WN along n, 16 R weight rows each, times WK along k (each a run of groups); all of 8 NT tokens
//   warps of one piece of n add up in halves through shared memory, always in the same order
//
// Weights go from memory to registers, a batch of groups ahead; x comes from the caches. A matrix is read once for up
// to 128 tokens; more tokens are further blocks, which find it in the L2 cache.
//
// Bytes: n k (1 + 1 / 16) + x + y; few tokens are bound by these.
//
// plain_linear: fp32, or x that is not aligned.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/infer_kernels.h"

namespace mm::cuda {
namespace {

constexpr int group_size = static_cast<int>(weight_group);
static_assert(group_size == 32);

// A warp a group.
__global__ void __launch_bounds__(256) quantize_kernel(int8_t* data, f16* scales, const float* w, int64_t n_group) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (group >= n_group) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float x = w[group * group_size + lane];
  const f16 scale = __float2half_rn(warp_max(fabsf(x)) / 127.0f);
  const float s = __half2float(scale);  // what the products will use
  const int q = s > 0.0f && s < INFINITY ? max(-127, min(127, __float2int_rn(x / s))) : 0;
  data[group * group_size + lane] = static_cast<int8_t>(q);
  if (lane == 0) scales[group] = scale;
}

template <class T>
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two int8 (the low bytes of w's halves; what lies above them does not matter) -> two T.
template <class T>
__device__ __forceinline__ uint32_t widen(uint32_t w) {
  if constexpr (std::is_same_v<T, bf16>) {  // (128 + low 7 bits) - (128 or 256)
    const uint32_t a = (w & 0x007f007fu) | 0x43004300u, b = (w & 0x00800080u) | 0x43004300u;
    const __nv_bfloat162 d =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  } else {  // (1024 + 128 + x) - (1024 + 128)
    const uint32_t a = ((w ^ 0x00800080u) & 0x00ff00ffu) | 0x64006400u, b = 0x64806480u;
    const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  }
}
// The weights' first read from memory: not kept in the first-level cache, where x is.
__device__ __forceinline__ uint2 load_weights(const int8_t* p) {
  uint2 u;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(u.x), "=r"(u.y) : "l"(p));
  return u;
}

template <class T>
struct Linear {
  T* y;
  const T *x, *residual;
  const int8_t* w;
  const f16* scales;
  int m, n, k;
};

constexpr int n_warp = 8;

template <class T, int NT, int R, int WN>
__global__ void __launch_bounds__(n_warp * 32) linear_kernel(const __grid_constant__ Linear<T> a) {
  constexpr int WK = n_warp / WN, batch = NT <= 2 ? 4 : NT <= 4 ? 2 : 1;
  extern __shared__ float4 parts[];  // [n_warp / 2][R * NT][32]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, m4 = lane % 4, wn = warp % WN, wk = warp / WN;
  const int row0 = (static_cast<int>(blockIdx.x) * WN + wn) * 16 * R, token0 = static_cast<int>(blockIdx.y) * 8 * NT;
  const int groups = a.k / group_size, begin = groups * wk / WK, end = groups * (wk + 1) / WK;
  // Rows and tokens behind the last are read from it and not written.
  const int8_t* w[R][2];
  const f16* scales[R][2];
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = min(row0 + 16 * r + 8 * h + g, a.n - 1);
      w[r][h] = a.w + row * a.k + m4 * 8;
      scales[r][h] = a.scales + row * groups;
    }
  }
  struct Batch {
    uint2 w[batch][R][2];
    f16 scale[batch][R][2];
  };
  const auto load_batch = [&](Batch& b, int first) {
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int group = min(first + i, end - 1);
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          b.w[i][r][h] = load_weights(w[r][h] + group * group_size);
          b.scale[i][r][h] = __ldg(scales[r][h] + group);
        }
      }
    }
  };
  float sum[R][NT][4] = {};
  Batch now, next;
  if (begin < end) load_batch(now, begin);
  for (int first = begin; first < end; first += batch) {
    if (first + batch < end) load_batch(next, first + batch);
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int group = first + i;
      if (group >= end) break;
      uint32_t fragments[R][2][4];
      float scale[R][2];
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint2 u = now.w[i][r][h];
          fragments[r][0][h] = widen<T>(__byte_perm(u.x, 0, 0x0100));
          fragments[r][0][2 + h] = widen<T>(__byte_perm(u.x, 0, 0x0302));
          fragments[r][1][h] = widen<T>(__byte_perm(u.y, 0, 0x0100));
          fragments[r][1][2 + h] = widen<T>(__byte_perm(u.y, 0, 0x0302));
          scale[r][h] = __half2float(now.scale[i][r][h]);
        }
      }
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const int64_t token = min(token0 + 8 * j + g, a.m - 1);
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(a.x + token * a.k + group * group_size + m4 * 8));
#pragma unroll
        for (int r = 0; r < R; r++) {
          float part[4] = {};
          product<T>(part, fragments[r][0], x.x, x.y);
          product<T>(part, fragments[r][1], x.z, x.w);
#pragma unroll
          for (int e = 0; e < 4; e++) sum[r][j][e] += part[e] * scale[r][e / 2];
        }
      }
    }
    now = next;
  }
#pragma unroll
  for (int half = WK / 2; half > 0; half /= 2) {
    if (half < WK / 2) __syncthreads();
    if (wk >= half && wk < 2 * half) {
#pragma unroll
      for (int i = 0; i < R * NT; i++) {
        const float(&s)[4] = sum[i / NT][i % NT];
        parts[(((wk - half) * WN + wn) * R * NT + i) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
      }
    }
    __syncthreads();
    if (wk < half) {
#pragma unroll
      for (int i = 0; i < R * NT; i++) {
        float(&s)[4] = sum[i / NT][i % NT];
        const float4 p = parts[((wk * WN + wn) * R * NT + i) * 32 + lane];
        s[0] += p.x, s[1] += p.y, s[2] += p.z, s[3] += p.w;
      }
    }
  }
  if (wk != 0) return;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = row0 + 16 * r + 8 * (e / 2) + g, token = token0 + 8 * j + 2 * m4 + e % 2;
        if (row >= a.n || token >= a.m) continue;
        const int64_t at = static_cast<int64_t>(token) * a.n + row;
        const float add = a.residual != nullptr ? to_float(a.residual[at]) : 0.0f;
        a.y[at] = from_float<T>(sum[r][j][e] + add);
      }
    }
  }
}

// A warp a weight row and 8 tokens.
template <class T>
__global__ void __launch_bounds__(n_warp * 32) plain_linear(const __grid_constant__ Linear<T> a) {
  constexpr int tokens = 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n_warp + threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.y) * tokens;
  if (row >= a.n) return;
  float sum[tokens] = {};
  for (int i = lane; i < a.k; i += 32) {
    const float w = static_cast<float>(a.w[row * a.k + i]) * __half2float(a.scales[row * (a.k / 32) + i / 32]);
#pragma unroll
    for (int t = 0; t < tokens; t++)
      sum[t] += w * to_float(a.x[static_cast<int64_t>(min(first + t, a.m - 1)) * a.k + i]);
  }
#pragma unroll
  for (int t = 0; t < tokens; t++) {
    sum[t] = warp_sum(sum[t]);
    if (lane != 0 || first + t >= a.m) continue;
    const int64_t at = static_cast<int64_t>(first + t) * a.n + row;
    a.y[at] = from_float<T>(sum[t] + (a.residual != nullptr ? to_float(a.residual[at]) : 0.0f));
  }
}

template <class T, int NT, int R, int WN>
void launch_linear(const Context& ctx, const Linear<T>& a) {
  constexpr int shared = n_warp / WN > 1 ? n_warp / 2 * R * NT * 32 * static_cast<int>(sizeof(float4)) : 0;
  const auto kernel = linear_kernel<T, NT, R, WN>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  MM_CUDA_CHECK(once);
  const dim3 grid(static_cast<unsigned>(div_up(a.n, 16 * R * WN)), static_cast<unsigned>(div_up(a.m, 8 * NT)));
  kernel<<<grid, n_warp * 32, shared, ctx.stream>>>(a);
}

template <class T>
void linear(const Context& ctx, const Linear<T>& a) {
  if constexpr (sizeof(T) == 2) {
    if (aligned({a.x, a.w})) {
      const int tiles = (a.m + 7) / 8;
      if (tiles <= 1) return launch_linear<T, 1, 1, 1>(ctx, a);
      if (tiles <= 2) return launch_linear<T, 2, 1, 1>(ctx, a);
      if (tiles <= 4) return launch_linear<T, 4, 1, 1>(ctx, a);
      if (tiles <= 16 && a.n < 4096) {
        if (tiles <= 8) return launch_linear<T, 8, 1, 1>(ctx, a);
        if (tiles <= 12) return launch_linear<T, 12, 1, 1>(ctx, a);
        return launch_linear<T, 16, 1, 1>(ctx, a);
      }
      if (tiles <= 8) return launch_linear<T, 8, 2, 2>(ctx, a);
      if (tiles <= 12) return launch_linear<T, 12, 2, 2>(ctx, a);
      return launch_linear<T, 16, 2, 4>(ctx, a);
    }
  }
  plain_linear<T><<<dim3(static_cast<unsigned>(div_up(a.n, n_warp)), static_cast<unsigned>(div_up(a.m, 8))),
                    n_warp * 32, 0, ctx.stream>>>(a);
}

}  // namespace

void quantize_i8(const Context& ctx, int8_t* data, void* scales, const float* w, int64_t n, int64_t k) {
  const int64_t groups = n * k / group_size;
  if (groups == 0) return;
  quantize_kernel<<<static_cast<unsigned>(div_up(groups, 8)), 256, 0, ctx.stream>>>(data, static_cast<f16*>(scales), w,
                                                                                    groups);
  MM_CUDA_LAUNCHED();
}

void linear_i8(const Context& ctx, DType t, void* y, const void* x, const int8_t* data, const void* scales,
               const void* residual, int64_t m, int64_t n, int64_t k) {
  if (m == 0 || n == 0) return;
  dispatch(t, [&]<class T>(T) {
    linear<T>(ctx, {static_cast<T*>(y), static_cast<const T*>(x), static_cast<const T*>(residual), data,
                    static_cast<const f16*>(scales), static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)});
  });
  MM_CUDA_LAUNCHED();
}

}  // namespace mm::cuda
