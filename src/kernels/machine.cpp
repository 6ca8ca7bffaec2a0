#include "kernels/machine.h"

#include <algorithm>

#include "base/progress.h"
#include "kernels/ops.h"
#include "tensor/buffer.h"

namespace mm {

double measure_peak_flops(const Device& dev) {
  Device quiet = dev;
  quiet.profiler = nullptr;
  const int64_t n = 1024;
  Buffer buffer(static_cast<size_t>(3 * n * n) * sizeof(float));
  Arena arena(buffer);
  const View x = arena.take(DType::f32, {n, n}), w = arena.take(DType::f32, {n, n}), y = arena.take(DType::f32, {n, n});
  std::fill_n(x.f32(), 2 * n * n, 0.5f);
  double best = 0;
  const double start = now_seconds();
  for (int i = 0; i < 20 && now_seconds() - start < 0.3; i++) {
    const double t = now_seconds();
    ops::linear_fwd(quiet, y, x, w);
    best = std::max(best, 2.0 * static_cast<double>(n * n * n) / (now_seconds() - t));
  }
  return best;
}

double measure_bandwidth(const Device& dev) {
  Device quiet = dev;
  quiet.profiler = nullptr;
  const int64_t n = int64_t{32} << 20;  // 128 MiB a buffer
  Buffer buffer(static_cast<size_t>(2 * n) * sizeof(float));
  Arena arena(buffer);
  const View y = arena.take(DType::f32, {n}), x = arena.take(DType::f32, {n});
  ops::zero(quiet, y);
  ops::zero(quiet, x);
  double best = 0;
  for (int i = 0; i < 4; i++) {
    const double t = now_seconds();
    ops::add(quiet, y, x);
    best = std::max(best, 12.0 * static_cast<double>(n) / (now_seconds() - t));
  }
  return best;
}

}  // namespace mm
