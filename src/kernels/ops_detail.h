// What the ops' files share: the choice of kernels, and the checks. Only they include this.
#pragma once

#include <initializer_list>

#include "base/error.h"
#include "kernels/ops.h"
#include "prof/profiler.h"
#ifdef MM_CUDA
#include "kernels/cuda/session.h"
#endif

namespace mm::ops {

inline const KernelTable& kernels(const Device& dev) {
  switch (dev.kind) {
    case DeviceKind::ref: return ref_kernels();
    case DeviceKind::cpu: return cpu_kernels();
    case DeviceKind::cuda: break;
  }
  MM_CHECK(false, "no kernel of this op for the device");
}

// ON_CUDA(call): on a GPU the op is that call of namespace cuda.
#ifdef MM_CUDA
inline const cuda::Context& gpu(const Device& dev) { return dev.cuda->ctx; }
#define ON_CUDA(call)                 \
  if (dev.kind == DeviceKind::cuda) { \
    cuda::call;                       \
    return;                           \
  }
#else
#define ON_CUDA(call)
#endif

inline bool use_bf16(const Device& dev) { return dev.matmul == DType::bf16; }

inline double moved(std::initializer_list<View> views) {  // bytes of what an op reads and writes once
  double s = 0;
  for (const View& v : views) s += v ? static_cast<double>(v.bytes()) : 0.0;
  return s;
}

inline void check_2d(const View& v, int64_t rows, int64_t cols, const char* what) {
  MM_CHECK(v.rows() == rows && v.cols() == cols, "{}: {}, wanted [{}, {}]", what, v.shape.str(), rows, cols);
}

inline void check_dense(const View& v, int64_t rows, int64_t cols, const char* what) {
  check_2d(v, rows, cols, what);
  MM_CHECK(v.contiguous(), "{} must be contiguous", what);
}

inline float* opt(const View& v) { return v ? v.f32() : nullptr; }

}  // namespace mm::ops
