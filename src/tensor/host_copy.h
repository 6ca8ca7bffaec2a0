// Floating-point numbers of a device on the host, as fp32: for tests, diagnosis and sampling.
#pragma once

#include <vector>

#include "tensor/device.h"
#include "tensor/view.h"

namespace mm {

std::vector<float> host_floats(const Device& dev, const View& v);  // v dense, f32, bf16 or f16; waits on a GPU

void copy_from_host(const Device& dev, const View& to, const std::vector<float>& from);  // rounds to `to`'s type; waits

}  // namespace mm
