#include "lab/bench.h"

#include <sys/resource.h>

#include <algorithm>

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

ordered_json bench_train(const TrainBenchOptions& o) {
  const double peak = measure_peak_flops(o.device), bandwidth = measure_bandwidth(o.device);
  const std::unique_ptr<Model> model = Model::random(o.config, 1);
  Profiler profiler;
  Device profiled = o.device;
  profiled.profiler = &profiler;
  const std::vector<TokenBatch> batch{random_batch(o)};
  std::vector<double> seconds;
  ordered_json ops = ordered_json::array();
  double profiled_seconds = 0;
  const auto run = [&](const Device& dev, int64_t steps) {
    TrainStep step(*model, dev, {.max_tok = batch[0].n_tok(), .seed = 1});
    Progress bar("bench train", steps, "steps");
    for (int64_t i = 0; i < steps; i++) {
      const double t = now_seconds();
      const StepResult r = step.accumulate(batch, i + 1);
      step.update(1e-4);
      if (i > 0) seconds.push_back(now_seconds() - t);
      bar.set(i + 1, fmt::format("loss {:.4f}", r.loss));
      if (i == 0) profiler.reset();  // the first step pays for compiling kernels and first touches of memory
    }
  };
  run(o.device, o.steps + 1);
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2], fastest = seconds.front();
  seconds.clear();
  run(profiled, 2);
  profiled_seconds = seconds.front();
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
          {"processor", cpu_features().model_name},
          {"isa", isa_name(selected_isa())},
          {"parameters", param_count(o.config)},
          {"tokens_per_second", tokens / median},
          {"step_seconds", median},
          {"step_seconds_min", fastest},
          {"share_of_peak", tokens / median * train_flops_per_token(o.config, static_cast<double>(o.seq_len)) / peak},
          {"peak_flops", peak},
          {"bandwidth", bandwidth},
          {"planned_memory_bytes", training_memory(o.config, batch[0].n_tok()).total()},
          {"peak_memory_bytes", static_cast<int64_t>(usage.ru_maxrss) * 1024},
          {"ops", ops}};
}

}  // namespace mm
