// What this machine can do at most, measured in a fraction of a second: the limits that reports hold numbers against.
#pragma once

#include "tensor/device.h"

namespace mm {

// Best of a few square matrix products in dev.matmul arithmetic, on all threads of the team. Operations a second.
double measure_peak_flops(const Device& dev);
// Best of a few triad passes (y = y + a x over buffers larger than the caches): bytes read and written a second.
double measure_bandwidth(const Device& dev);
// Bytes a second that all threads of the team go on reading of the same `bytes` of host memory, each its own part again
// and again without waiting for the others: best of three stretches of 0.1 s. What caches hold of them they hold: the
// limit of work that reads so much each time. (Single passes are no measure: they swing between half and twice the
// speed where other machines use the memory too, and with several threads each one pays for a start and a wait.)
double measure_read_bandwidth(int64_t bytes);

}  // namespace mm
