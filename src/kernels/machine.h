// What this machine can do at most, measured in a fraction of a second: the limits that reports hold numbers against.
#pragma once

#include "tensor/device.h"

namespace mm {

// Best of a few square matrix products in dev.matmul arithmetic, on all threads of the team. Operations a second.
double measure_peak_flops(const Device& dev);
// Best of a few triad passes (y = y + a x over buffers larger than the caches): bytes read and written a second.
double measure_bandwidth(const Device& dev);
// Bytes a second that all threads of the team read of the same `bytes` of host memory again and again, each its own
// part in order: the median of a few passes, as speeds of work are medians too (memory that is shared with other
// machines gives now half, now twice as much). What caches hold of them they hold: the limit of work that reads so much
// each time.
double measure_read_bandwidth(int64_t bytes);

}  // namespace mm
