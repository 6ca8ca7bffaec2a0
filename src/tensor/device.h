// Where an op runs and with which arithmetic. Passed to every op; no global state.
#pragma once

#include "tensor/dtype.h"
#include "tensor/memory.h"

namespace mm {

class Profiler;
namespace cuda {
class Session;
}

// ref is the scalar specification run as a device of its own: slow, for tests and for finding a wrong kernel.
enum class DeviceKind { ref, cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  // Type of the operands inside matrix products; sums and results stay fp32. bf16 needs AVX-512 (see
  // matmul_bf16_available()).
  DType matmul = DType::f32;
  // Type of activations and working weights: f32 on the CPU; f32, bf16 or f16 on a GPU (masters and gradients are
  // fp32).
  DType act = DType::f32;
  cuda::Session* cuda = nullptr;  // not owned; of kind cuda alone, as the next
  CUstream_st* stream = nullptr;
  bool on_gpu() const { return kind == DeviceKind::cuda; }
  Memory memory() const { return kind == DeviceKind::cuda ? Memory::cuda : Memory::host; }
  Profiler* profiler = nullptr;  // not owned; null: nothing is recorded
};

}  // namespace mm
