// Measurements of this program on this machine, each held against the machine's own measured limits.
#pragma once

#include <vector>

#include "base/json.h"
#include "model/activations.h"
#include "model/config.h"
#include "tensor/device.h"

namespace mm {

struct TrainBenchOptions {
  ModelConfig config;
  int64_t batch_size = 4, seq_len = 512, steps = 7;
  int64_t pass_tokens = 0;  // GPU: see TrainOptions
  Recompute recompute = Recompute::cheap;
  Device device;
};

// Whole optimizer steps (forward, backward, clipping, AdamW) on random tokens, each row a sequence of seq_len. Median
// of `steps` after one for warm-up. {"tokens_per_second", "step_seconds", "step_seconds_min", "share_of_peak",
// "peak_flops", "bandwidth", "peak_memory_bytes", "ops": [...]}; ops come from one more step with the profiler on:
// name, calls, ms, share of the step, GFLOP/s and GB/s with their shares of the limits.
ordered_json bench_train(const TrainBenchOptions& options);

}  // namespace mm
