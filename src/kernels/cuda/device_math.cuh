// What the CUDA kernels share: loads and stores of several neighbouring elements as floats, reductions in a fixed
// order, Philox, and the choice of a kernel by type and alignment on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_kernels.h"

namespace mm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// --- elements -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}
template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// Two neighbours in one register.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t u) {
  if constexpr (std::is_same_v<T, bf16>) return {__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u)};
  else return __half22float2(*reinterpret_cast<const __half2*>(&u));
}
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&h);
  } else {
    const __half2 h = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
}

// Of two pairs, each rounded once.
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 y =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&y);
}

// --- several elements at once -------------------------------------------------------------------------------------
template <class T>
constexpr int per_16_bytes = 16 / static_cast<int>(sizeof(T));

// V elements as they lie in memory. p must be aligned to min(16, V * sizeof(T)) bytes.
template <class T, int V>
struct Raw {
  static constexpr int bytes = V * static_cast<int>(sizeof(T));
  static constexpr int words = bytes < 4 ? 1 : bytes / 4;
  uint32_t w[words];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (bytes >= 16) {
#pragma unroll
      for (int i = 0; i < bytes / 16; i++) {
        const uint4 u = reinterpret_cast<const uint4*>(p)[i];
        w[4 * i] = u.x, w[4 * i + 1] = u.y, w[4 * i + 2] = u.z, w[4 * i + 3] = u.w;
      }
    } else if constexpr (bytes == 8) {
      const uint2 u = *reinterpret_cast<const uint2*>(p);
      w[0] = u.x, w[1] = u.y;
    } else if constexpr (bytes == 4) {
      w[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      w[0] = *reinterpret_cast<const uint16_t*>(p);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (bytes >= 16) {
#pragma unroll
      for (int i = 0; i < bytes / 16; i++)
        reinterpret_cast<uint4*>(p)[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    } else if constexpr (bytes == 8) {
      *reinterpret_cast<uint2*>(p) = make_uint2(w[0], w[1]);
    } else if constexpr (bytes == 4) {
      *reinterpret_cast<uint32_t*>(p) = w[0];
    } else {
      *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(w[0]);
    }
  }
  // Hides the value from the compiler, which would otherwise keep the floats of a pack that a loop does not change in
  // twice as many registers.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < words; i++) asm volatile("" : "+r"(w[i]));
  }
  __device__ __forceinline__ void get(float (&x)[V]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < V; i++) x[i] = __uint_as_float(w[i]);
    } else if constexpr (V == 1) {
      x[0] = unpack2<T>(w[0]).x;
    } else {
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        const float2 f = unpack2<T>(w[i]);
        x[2 * i] = f.x, x[2 * i + 1] = f.y;
      }
    }
  }
  __device__ __forceinline__ void set(const float (&x)[V]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < V; i++) w[i] = __float_as_uint(x[i]);
    } else if constexpr (V == 1) {
      w[0] = pack2<T>(x[0], 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < V / 2; i++) w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    }
  }
};

template <class T, int V>
__device__ __forceinline__ void load(float (&x)[V], const T* p) {
  Raw<T, V> r;
  r.load(p);
  r.get(x);
}
template <class T, int V>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  Raw<T, V> r;
  r.set(x);
  r.store(p);
}

// --- reductions ---------------------------------------------------------------------------------------------------
// Larger of two; NaN when either is (fmaxf would drop it).
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Over `width` neighbouring lanes (a power of two); every lane gets the same bits.
template <int width = 32, class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int i = width / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
template <int width = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = width / 2; i > 0; i /= 2) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}

// Over a block of whole warps; every thread gets the result. `shared` holds one S a warp and may be used again only
// after a barrier of the caller's (or through another array).
template <class S>
__device__ __forceinline__ S block_sum(S x, S* shared) {
  x = warp_sum(x);
  const int n_warp = static_cast<int>(blockDim.x) / 32;
  if (n_warp == 1) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  S s = shared[0];
  for (int i = 1; i < n_warp; i++) s += shared[i];
  return s;
}
__device__ __forceinline__ float block_max(float x, float* shared) {
  x = warp_max(x);
  const int n_warp = static_cast<int>(blockDim.x) / 32;
  if (n_warp == 1) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float m = shared[0];
  for (int i = 1; i < n_warp; i++) m = max_nan(m, shared[i]);
  return m;
}

// --- Philox4x32-10: the same numbers as base/rng.h ----------------------------------------------------------------
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t stream, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint4 c = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), static_cast<uint32_t>(stream),
             static_cast<uint32_t>(stream >> 32)};
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
    const uint32_t h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
    c = make_uint4(h1 ^ c.y ^ k0, l1, h0 ^ c.w ^ k1, l0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}
__device__ __forceinline__ float to_unit_float(uint32_t x) { return static_cast<float>(x >> 8) * 0x1p-24f; }

// --- host side ----------------------------------------------------------------------------------------------------
// f(T{}) with the element type of t.
template <class F>
void dispatch(DType t, F&& f) {
  switch (t) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    case DType::f32: return f(float{});
    default: fail("element type", "not bf16, f16 or f32", __FILE__, __LINE__);
  }
}

inline bool aligned(std::initializer_list<const void*> pointers, size_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// Memory reserved in ctx.scratch piece by piece, each 256-byte aligned.
class Scratch {
 public:
  explicit Scratch(const Context& ctx) : at_(static_cast<char*>(ctx.scratch)), left_(ctx.scratch_bytes) {}
  template <class S>
  S* take(size_t count) {
    const size_t bytes = (count * sizeof(S) + 255) / 256 * 256;
    if (bytes > left_) fail("scratch memory", "too small", __FILE__, __LINE__);
    S* p = reinterpret_cast<S*>(at_);
    at_ += bytes, left_ -= bytes;
    return p;
  }
  size_t left() const { return left_; }

 private:
  char* at_;
  size_t left_;
};

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mm::cuda
