// Single ops at the sizes of a training step, each held against the machine's measured limits.
#pragma once

#include "base/json.h"
#include "tensor/device.h"

namespace mm {

// {"bench": "ops", "processor", "dtype", "peak_flops", "bandwidth", "ops": [{"op", "shape", "us" (median of `rounds`),
// "us_min", "us_max", "gflops", "share_of_peak", "gbytes_per_second", "share_of_bandwidth"}, ...]}. Bytes and
// operations are floors: what must be moved and computed at least. On a GPU a round is many launches and one wait.
// `tokens` scales the shapes (24576 is a step of the 64M model); numbers are random.
ordered_json bench_ops(const Device& device, int64_t tokens, int rounds);

}  // namespace mm
