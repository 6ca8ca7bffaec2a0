#include "lab/bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <functional>

#include "base/cpu_features.h"
#include "base/progress.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "kernels/machine.h"
#include "model/cost.h"
#include "prof/profiler.h"
#include "train/train_step.h"

namespace mm {

static TokenBatch random_batch(const TrainBenchOptions& o) {
  TokenBatch b;
  b.clear();
  Rng rng{7, 0, 0};
  for (int64_t r = 0; r < o.batch_size; r++) {
    for (int64_t t = 0; t < o.seq_len; t++) {
      b.ids.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(o.config.vocab_size))));
      b.positions.push_back(static_cast<int32_t>(t));
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
  }
  for (int64_t i = 0; i < b.n_tok(); i++) {
    const bool last = (i + 1) % o.seq_len == 0;
    b.targets.push_back(last ? -1 : b.ids[static_cast<size_t>(i) + 1]);
    b.loss_weight.push_back(last ? 0.0f : 1.0f);
  }
  return b;
}

// Seconds a step of each of `rounds` rounds, after warm-up. A GPU is waited for once a round, not once a step: waiting
// would leave it idle between steps, which training does not.
static std::vector<double> time_steps(const TrainBenchOptions& o, const Device& dev, Model& model,
                                      const std::vector<TokenBatch>& batch, int64_t rounds,
                                      const std::function<void()>& warmed_up) {
  const int64_t per_round = dev.on_gpu() && dev.profiler == nullptr ? 8 : 1, warm_up = dev.on_gpu() ? 3 : 1;
  TrainStep step(model, dev,
                 {.max_tok = o.pass_tokens > 0 ? std::min(o.pass_tokens, batch[0].n_tok()) : batch[0].n_tok(),
                  .seed = 1,
                  .recompute = o.recompute});
  Progress bar("bench train", rounds, "rounds");
  std::vector<double> seconds;
  int64_t number = 0;
  for (int64_t i = -1; i < rounds; i++) {
    const double t = now_seconds();
    const int64_t n = i < 0 ? warm_up : per_round;
    StepResult r;
    for (int64_t k = 0; k < n; k++) {
      step.begin(batch, ++number);
      step.update(1e-4);
      if (k > 0) r = step.result();  // a step late
    }
    r = step.result();
    if (dev.on_gpu()) synchronize(dev.stream);
    if (i >= 0) seconds.push_back((now_seconds() - t) / static_cast<double>(n));
    else warmed_up();  // that step paid for compiling kernels, timing products and first touches of memory
    bar.set(i + 1, fmt::format("loss {:.4f}", r.loss));
  }
  return seconds;
}

ordered_json bench_train(const TrainBenchOptions& o) {
  const double peak = measure_peak_flops(o.device), bandwidth = measure_bandwidth(o.device);
  const std::unique_ptr<Model> model = Model::random(o.config, 1);
  Profiler profiler(o.device.on_gpu() ? [stream = o.device.stream] { synchronize(stream); } : std::function<void()>());
  Device profiled = o.device;
  profiled.profiler = &profiler;
  const std::vector<TokenBatch> batch{random_batch(o)};
  ordered_json ops = ordered_json::array();
  size_t device_bytes = 0;
  std::vector<double> seconds =
      time_steps(o, o.device, *model, batch, o.steps, [&] { device_bytes = device_bytes_in_use(); });
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2], fastest = seconds.front();
  const double profiled_seconds = time_steps(o, profiled, *model, batch, 1, [&] { profiler.reset(); })[0];
  for (const ZoneStats& z : profiler.zones()) {
    ops.push_back({{"op", z.name},
                   {"calls", z.calls},
                   {"ms", 1e3 * z.seconds},
                   {"share_of_step", z.seconds / profiled_seconds},
                   {"gflops", z.flops / z.seconds / 1e9},
                   {"share_of_peak", z.flops / z.seconds / peak},
                   {"gbytes_per_second", z.bytes / z.seconds / 1e9},
                   {"share_of_bandwidth", z.bytes / z.seconds / bandwidth}});
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto tokens = static_cast<double>(batch[0].n_tok());
  return {{"bench", "train"},
          {"batch_size", o.batch_size},
          {"seq_len", o.seq_len},
          {"dtype", dtype_name(o.device.matmul)},
          {"threads", num_threads()},
          {"processor", o.device.on_gpu() ? cuda_status().name : cpu_features().model_name},
          {"isa", isa_name(selected_isa())},
          {"parameters", param_count(o.config)},
          {"tokens_per_second", tokens / median},
          {"step_seconds", median},
          {"step_seconds_min", fastest},
          {"share_of_peak", tokens / median * train_flops_per_token(o.config, static_cast<double>(o.seq_len)) / peak},
          {"peak_flops", peak},
          {"bandwidth", bandwidth},
          {"planned_memory_bytes",
           training_memory(o.config, o.pass_tokens > 0 ? std::min(o.pass_tokens, batch[0].n_tok()) : batch[0].n_tok(),
                           o.device, o.recompute)
               .total()},
          {"peak_memory_bytes",
           o.device.on_gpu() ? static_cast<int64_t>(device_bytes) : static_cast<int64_t>(usage.ru_maxrss) * 1024},
          {"ops", ops}};
}

}  // namespace mm
