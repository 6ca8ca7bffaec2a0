#include "kernels/machine.h"

#include <algorithm>
#include <vector>

#include "base/progress.h"
#include "base/thread_team.h"
#include "kernels/ops.h"
#include "tensor/buffer.h"
#include "tensor/host_copy.h"

namespace mm {

namespace {

// Runs f and waits for a GPU to have done it; seconds.
template <class F>
double timed(const Device& dev, F&& f) {
  const double start = now_seconds();
  f();
  if (dev.on_gpu()) synchronize(dev.stream);
  return now_seconds() - start;
}

Device without_profiler(const Device& dev) {
  Device quiet = dev;
  quiet.profiler = nullptr;
  return quiet;
}

}  // namespace

double measure_peak_flops(const Device& dev) {
  const Device quiet = without_profiler(dev);
  const int64_t n = dev.on_gpu() ? 8192 : 1024;
  const Buffer buffer(static_cast<size_t>(3 * n * n) * dtype_size(dev.act), dev.memory());
  Arena arena(buffer);
  const View x = arena.take(dev.act, {n, n}), w = arena.take(dev.act, {n, n}), y = arena.take(dev.act, {n, n});
  // Random numbers on a GPU: zeros draw less power and run faster than data does.
  const View both(x.data, dev.act, {2 * n, n});
  std::vector<float> numbers(static_cast<size_t>(both.numel()));
  parallel_for(both.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      numbers[static_cast<size_t>(i)] = static_cast<float>(i * 2654435761 % 1000) * 1e-3f - 0.5f;
  });
  copy_from_host(quiet, both, numbers);
  double best = 0;
  const double start = now_seconds();
  for (int i = 0; i < 20 && now_seconds() - start < 0.3; i++) {
    const int repeats = dev.on_gpu() ? 4 : 1;
    const double t = timed(quiet, [&] {
      for (int r = 0; r < repeats; r++) ops::linear_fwd(quiet, y, x, w);
    });
    best = std::max(best, 2.0 * static_cast<double>(n * n * n) * repeats / t);
  }
  return best;
}

double measure_bandwidth(const Device& dev) {
  const Device quiet = without_profiler(dev);
  const int64_t n = int64_t{dev.on_gpu() ? 256 : 32} << 20;
  const Buffer buffer(static_cast<size_t>(2 * n) * sizeof(float), dev.memory());
  Arena arena(buffer);
  const View y = arena.take(DType::f32, {n}), x = arena.take(DType::f32, {n});
  ops::zero(quiet, y);
  ops::zero(quiet, x);
  double best = 0;
  for (int i = 0; i < 6; i++) {
    const double add = timed(quiet, [&] { ops::add(quiet, y, x); });
    best = std::max(best, 12.0 * static_cast<double>(n) / add);
    if (dev.on_gpu()) {
      const double copy = timed(quiet, [&] { ops::copy(quiet, y, x); });
      best = std::max(best, 8.0 * static_cast<double>(n) / copy);
    }
  }
  return best;
}

}  // namespace mm
