// y [m, n] = norm(x) [m, k] w^T for few tokens (a decode step), with weights of type T or int8 and, in one launch, the
// RMSNorm before and the residual or SwiGLU behind:
//
//   rows    16 R weight rows a block are the rows of mma.m16n8k16, 8 NT tokens its columns
//   k       each of 8 warps takes a run of groups of 32; lane 4 g + m4 takes elements 8 m4 .. + 8 of rows g and g + 8
//   and of
//           tokens g of each 8, which are its fragments of two products in a permuted order of k
//   norm    the weights' fragments are multiplied by the norm's weight (one rounding, as that of the normed x
//   elsewhere);
//           sums of squares gather on the way, the sums are multiplied by 1 / rms at the end
//   int8    becomes T exactly; a group's two products are summed on their own and added times the group's scale
//   SwiGLU  R = 2: the second 16 rows are those of `up`
//
// Weights go to registers kAhead groups ahead, the first before the kernel waits for its predecessor; x goes through a
// ring in shared memory of which each thread reads what it copied itself (cp.async): no barriers but one, before the
// warps' sums are added in a fixed order.
//
// Bytes: the weights (per 8 NT tokens once, from the L2 cache), x once a block; the time of small matrices is that of
// the dependent steps. A row's bits do not depend on the other rows.
//
// Measured on an H100, bf16, in a graph, weights not in L2, beside cuBLASLt (us): 1536 x 768 16 tokens 2.6 / 4.0,
// 32 3.0 / 4.0, 96 4.3 / 4.2; 768 x 768 16 2.2 / 3.2, 96 3.2 / 3.6; 768 x 2432 16 4.6 / 5.8, 32 5.3 / 5.8, 96 8.0
// / 6.0; 6400 x 768 16 5.2 / 5.8, 32 6.1 / 5.9, 96 13.6 / 6.2 (what many tokens lack is x shared between blocks). A
// decode step of the 64M model (8 layers, 200 keys) with all that it fuses, beside separate launches: 9 sequences 175 /
// 262 us, 16 192 / 275, 32 226 / 285, 64 362 / 329; without the overlap of kernels 250, 262, 284. Slower: groups dealt
// out to the warps in turn (large matrices 25 %), a clamp of the tokens behind the last (1 token of 6400 x 768 10.7
// instead of 6.4 us: the copies of one address by eight lanes follow one another), k split over less than the 8 warps
// with x shared.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"

namespace mm::cuda {
namespace {

constexpr int n_warp = 8, group_size = static_cast<int>(weight_group), max_stages = 4;
static_assert(group_size == 32);

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
template <class T>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  using P = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  const P d = __hmul2(*reinterpret_cast<const P*>(&a), *reinterpret_cast<const P*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// 8 weights of one row. Read once: not kept in the first-level cache.
template <bool kInt8>
struct Piece {
  uint32_t w[kInt8 ? 2 : 4];
  __device__ __forceinline__ void load(const void* p) {
    if constexpr (kInt8)
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    else
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "l"(p));
  }
  // Elements 2 i, 2 i + 1.
  template <class T>
  __device__ __forceinline__ uint32_t pair(int i) const {
    if constexpr (kInt8) return widen<T>(__byte_perm(w[i / 2], 0, i % 2 == 0 ? 0x0100 : 0x0302));
    else return w[i];
  }
};

struct Params {
  void* y;
  const void *x, *w, *residual, *norm;
  const f16* scales;
  float eps;
  int m, n, k, up;  // up: rows from a gate's to its up; 0: no SwiGLU
};

template <int R>
constexpr int padded_rows = 16 * R + 4;  // of a token's sums: no bank conflicts

template <bool kInt8, int NT, int R>
struct Few {
  static constexpr int ahead = R * (kInt8 ? 1 : 2) <= 2 ? 4 : 2;  // groups of weights in registers
  static constexpr int stages = NT <= 4 ? max_stages : 3;         // of x
  static constexpr int stage = n_warp * NT * 512, ring = stages * stage;
  static constexpr int sums = 4 * n_warp * 8 * NT * (padded_rows<R> + 1);
  static constexpr int shared = ring > sums ? ring : sums;
};

template <class T, bool kInt8, int NT, int R>
__global__ void __launch_bounds__(n_warp * 32) few_kernel(const __grid_constant__ Params a) {
  using F = Few<kInt8, NT, R>;
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, m4 = lane % 4, token0 = static_cast<int>(blockIdx.y) * 8 * NT;
  const bool swiglu = a.up != 0;
  const int row0 = static_cast<int>(blockIdx.x) * (swiglu ? 8 * R : 16 * R), groups = a.k / group_size;
  const int begin = groups * warp / n_warp, end = groups * (warp + 1) / n_warp;
  // First row of the 16 of tile r.
  const auto tile_row = [&](int r) { return swiglu ? row0 + r / 2 * 16 + (r & 1) * a.up : row0 + 16 * r; };
  const int n_out = swiglu ? a.up : a.n;
  // Rows behind the last are read from it and not written; tokens behind the last are zeros.
  int64_t row[R][2];
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int h = 0; h < 2; h++) row[r][h] = min(tile_row(r) + 8 * h + g, a.n - 1);
  }
  Piece<kInt8> w[F::ahead][R][2];
  f16 scale[kInt8 ? F::ahead : 1][R][2];
  uint4 norm[F::ahead];
  const auto load_weights = [&](int slot, int group) {
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t at = row[r][h] * a.k + group * group_size + m4 * 8;
        w[slot][r][h].load(static_cast<const char*>(a.w) + at * (kInt8 ? 1 : 2));
        if constexpr (kInt8) scale[slot][r][h] = __ldg(a.scales + row[r][h] * groups + group);
      }
    }
    if (a.norm != nullptr)
      norm[slot] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(a.norm) + group * group_size + m4 * 8));
  };
#pragma unroll
  for (int i = 0; i < F::ahead; i++) {
    if (begin + i < end) load_weights(i, begin + i);
  }
  for (int group = begin + F::ahead; group < end && m4 == 0; group++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int h = 0; h < 2; h++)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(a.w) +
                                                      (row[r][h] * a.k + group * group_size) * (kInt8 ? 1 : 2)));
    }
  }
  let_next_begin();
  wait_for_previous();

  unsigned char* const ring = memory + (warp * NT * 32 + lane) * 16;
  const uint32_t ring_at = shared_address(ring);
  const T* x = static_cast<const T*>(a.x) + m4 * 8;
  const auto copy_x = [&](int stage, int group) {
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const int token = token0 + 8 * j + g;
      cp_async16(ring_at + stage * F::stage + j * 512,
                 x + static_cast<int64_t>(min(token, a.m - 1)) * a.k + group * group_size, token < a.m);
    }
  };
#pragma unroll
  for (int i = 0; i < F::stages - 1; i++) {
    if (begin + i < end) copy_x(i, begin + i);
    cp_async_commit();
  }
  float sum[R][NT][4] = {}, squares[NT] = {};
  int stage = 0;
  for (int first = begin; first < end; first += F::ahead) {
#pragma unroll
    for (int i = 0; i < F::ahead; i++) {
      const int group = first + i, next = group + F::stages - 1;
      if (group >= end) break;
      asm volatile("" ::: "memory");  // what the copies overwrite has been read
      if (next < end) copy_x(stage == 0 ? F::stages - 1 : stage - 1, next);
      cp_async_commit();
      cp_async_wait<F::stages - 1>();
      uint32_t fragments[R][2][4];
      float factor[R][2];
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int e = 0; e < 4; e++) fragments[r][e / 2][h + 2 * (e % 2)] = w[i][r][h].template pair<T>(e);
          if constexpr (kInt8) factor[r][h] = __half2float(scale[i][r][h]);
        }
        if (a.norm != nullptr) {
          const uint32_t by[4] = {norm[i].x, norm[i].y, norm[i].z, norm[i].w};
#pragma unroll
          for (int e = 0; e < 8; e++)
            fragments[r][e / 4][e % 4] = multiply<T>(fragments[r][e / 4][e % 4], by[e / 4 * 2 + e % 4 / 2]);
        }
      }
      if (group + F::ahead < end) load_weights(i, group + F::ahead);
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const uint4 b = *reinterpret_cast<const uint4*>(ring + stage * F::stage + j * 512);
        if (a.norm != nullptr) {
          const uint32_t words[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float2 f = unpack2<T>(words[e]);
            squares[j] += f.x * f.x + f.y * f.y;
          }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          if constexpr (kInt8) {
            float part[4] = {};
            product<T>(part, fragments[r][0], b.x, b.y);
            product<T>(part, fragments[r][1], b.z, b.w);
#pragma unroll
            for (int e = 0; e < 4; e++) sum[r][j][e] += part[e] * factor[r][e / 2];
          } else {
            product<T>(sum[r][j], fragments[r][0], b.x, b.y);
            product<T>(sum[r][j], fragments[r][1], b.z, b.w);
          }
        }
      }
      stage = stage == F::stages - 1 ? 0 : stage + 1;
    }
  }

  // The ring becomes sums [n_warp][8 NT][padded_rows] and squares [n_warp][8 NT].
  constexpr int tokens = 8 * NT, rows = padded_rows<R>;
  float *const sums = reinterpret_cast<float*>(memory), *const squares_of = sums + n_warp * tokens * rows;
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums[(warp * tokens + 8 * j + 2 * m4 + e % 2) * rows + 16 * r + 8 * (e / 2) + g] = sum[r][j][e];
    }
    if (a.norm != nullptr) {
      const float s = warp_sum<4>(squares[j]);
      if (m4 == 0) squares_of[warp * tokens + 8 * j + g] = s;
    }
  }
  __syncthreads();
  const int pairs = swiglu ? 4 * R : 8 * R;  // of neighbouring outputs of a token
  for (int i = static_cast<int>(threadIdx.x); i < tokens * pairs; i += n_warp * 32) {
    const int t = i / pairs, c = i % pairs * 2, token = token0 + t;
    if (token >= a.m) break;
    const auto total = [&](int at) {
      float2 s = *reinterpret_cast<const float2*>(sums + t * rows + at);
#pragma unroll
      for (int v = 1; v < n_warp; v++) {
        const float2 p = *reinterpret_cast<const float2*>(sums + (v * tokens + t) * rows + at);
        s.x += p.x, s.y += p.y;
      }
      return s;
    };
    float r = 1.0f;
    if (a.norm != nullptr) {
      float s = 0.0f;
#pragma unroll
      for (int v = 0; v < n_warp; v++) s += squares_of[v * tokens + t];
      r = rsqrtf(s / static_cast<float>(a.k) + a.eps);
    }
    float2 out = total(swiglu ? c / 16 * 32 + c % 16 : c);
    out.x *= r, out.y *= r;
    const int column = row0 + c;
    const int64_t at = static_cast<int64_t>(token) * n_out + column;
    if (swiglu) {
      const float2 up = total(c / 16 * 32 + 16 + c % 16);
      const auto silu = [](float z) { return z / (1.0f + __expf(-z)); };
      out.x = silu(out.x) * (up.x * r), out.y = silu(out.y) * (up.y * r);
    }
    if (column + 1 < n_out && n_out % 2 == 0) {
      if (a.residual != nullptr) {
        const float2 add = unpack2<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(a.residual) + at));
        out.x += add.x, out.y += add.y;
      }
      *reinterpret_cast<uint32_t*>(static_cast<T*>(a.y) + at) = pack2<T>(out.x, out.y);
    } else {
      const float both[2] = {out.x, out.y};
      for (int e = 0; e < 2 && column + e < n_out; e++) {
        const float add = a.residual != nullptr ? to_float(static_cast<const T*>(a.residual)[at + e]) : 0.0f;
        static_cast<T*>(a.y)[at + e] = from_float<T>(both[e] + add);
      }
    }
  }
}

template <class T, bool kInt8, int NT, int R>
void launch_few(const Context& ctx, const Params& p) {
  constexpr int shared = Few<kInt8, NT, R>::shared;
  const auto kernel = few_kernel<T, kInt8, NT, R>;
  static const cudaError_t once = [&] {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    return e != cudaSuccess ? e : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }();
  MM_CUDA_CHECK(once);
  const int64_t per_block = p.up != 0 ? 8 * R : 16 * R;
  const dim3 grid(static_cast<unsigned>(div_up(p.up != 0 ? p.up : p.n, per_block)),
                  static_cast<unsigned>(div_up(p.m, 8 * NT)));
  launch_overlapped(ctx, kernel, grid, n_warp * 32, shared, 1, p);
}

// Measured choices: small matrices want many blocks, wide ones more rows a block (x is loaded once for them).
template <class T, bool kInt8>
void choose(const Context& ctx, const Params& p) {
  const int tiles = (p.m + 7) / 8;
  if (p.up != 0 || p.n > 32 * ctx.n_sm) {
    if (tiles <= 1) return launch_few<T, kInt8, 1, 2>(ctx, p);
    if (tiles <= 2) return launch_few<T, kInt8, 2, 4>(ctx, p);
    if (tiles <= 4 || p.up != 0) return launch_few<T, kInt8, 4, 4>(ctx, p);
    if (ctx.arch != 80 && ctx.arch != 90 && ctx.arch != 100)  // 99 KB of shared memory a block
      return launch_few<T, kInt8, 6, 2>(ctx, p);
    return launch_few<T, kInt8, 12, 2>(ctx, p);
  }
  if (tiles <= 1) return launch_few<T, kInt8, 1, 1>(ctx, p);
  if (tiles <= 4) return launch_few<T, kInt8, 2, 1>(ctx, p);
  if (p.n <= 8 * ctx.n_sm && p.k <= 1024) return launch_few < T, kInt8, 4, kInt8 ? 2 : 1 > (ctx, p);
  launch_few<T, kInt8, 6, 2>(ctx, p);
}

}  // namespace

bool linear_few_fits(DType t, const FewLinear& a) {
  return t != DType::f32 && a.k % group_size == 0 && aligned({a.x, a.w, a.norm}) && aligned({a.y, a.residual}, 4) &&
         a.m * a.k < (int64_t{1} << 31) && a.n < (int64_t{1} << 31);
}

bool linear_few_pays(const FewLinear& a) { return a.m <= 32; }

void linear_few(const Context& ctx, DType t, const FewLinear& a) {
  if (a.m == 0 || a.n == 0) return;
  if (!linear_few_fits(t, a)) fail("linear_few", "type, sizes or addresses that it does not take", __FILE__, __LINE__);
  const Params p = {a.y,
                    a.x,
                    a.w,
                    a.residual,
                    a.norm,
                    static_cast<const f16*>(a.scales),
                    a.eps,
                    static_cast<int>(a.m),
                    static_cast<int>(a.n),
                    static_cast<int>(a.k),
                    a.swiglu ? static_cast<int>(a.n / 2) : 0};
  const auto run = [&]<class T>(T) {
    if (a.scales != nullptr) choose<T, true>(ctx, p);
    else choose<T, false>(ctx, p);
  };
  if (t == DType::bf16) run(bf16{});
  else run(f16{});
}

}  // namespace mm::cuda
