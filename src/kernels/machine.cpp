#include "kernels/machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "base/progress.h"
#include "base/rng.h"
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
  // Numbers like those of data: on zeros a GPU draws less power and runs faster.
  std::vector<float> numbers(static_cast<size_t>(128 * n));
  for (size_t i = 0; i < numbers.size(); i++) numbers[i] = philox_normal(1, 2, i);
  const View both(x.data, dev.act, {2 * n, n});
  for (int64_t row = 0; row < 2 * n; row += 128) copy_from_host(quiet, both.row_slice(row, row + 128), numbers);
  timed(quiet, [&] { ops::linear_fwd(quiet, y, x, w); });  // pays for what the first product of a shape does
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

double measure_read_bandwidth(int64_t bytes) {
  constexpr int64_t unit = 512;
  constexpr double window = 0.1;  // seconds
  const int64_t n = std::max<int64_t>(bytes / unit, 1);
  const Buffer buffer(static_cast<size_t>(n * unit), Memory::host);
  std::memset(buffer.data(), 1, buffer.size());
  const auto* words = static_cast<const uint64_t*>(buffer.data());
  std::atomic<uint64_t> sink = 0;
  double best = 0;
  for (int i = 0; i < 4; i++) {  // the first warms the caches
    std::atomic<double> speed = 0;
    parallel_team([&](int thread, int n_threads) {
      uint64_t sum[8] = {};
      const int64_t begin = n * thread / n_threads * (unit / 8), end = n * (thread + 1) / n_threads * (unit / 8);
      int64_t passes = 0;
      const double start = now_seconds();
      double spent = 0;
      do {
        for (int64_t w = begin; w < end; w += 8) {
          __builtin_prefetch(words + std::min(w + 2048, end), 0, 2);  // into L2: more than the hardware asks for
          for (int64_t j = 0; j < 8; j++) sum[j] += words[w + j];
        }
        passes++;
        spent = now_seconds() - start;
      } while (spent < window);
      speed += static_cast<double>((end - begin) * 8 * passes) / spent;
      sink += std::accumulate(std::begin(sum), std::end(sum), uint64_t{0});
    });
    if (i > 0) best = std::max(best, speed.load());
  }
  MM_CHECK(sink > 0);
  return best;
}

}  // namespace mm
