// Where an op runs and with which arithmetic. Passed to every op; no global state.
#pragma once

#include "tensor/dtype.h"

namespace mm {

class Profiler;

// ref is the scalar specification run as a device of its own: slow, for tests and for finding a wrong kernel.
enum class DeviceKind { ref, cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  // Type of the operands inside matrix products; sums and results stay fp32. bf16 needs AVX-512 (see
  // matmul_bf16_available()).
  DType matmul = DType::f32;
  Profiler* profiler = nullptr;  // not owned; null: nothing is recorded
};

}  // namespace mm
