// From --device and --dtype to a Device, with the GPU session that it needs.
#pragma once

#include <memory>
#include <string>

#include "tensor/device.h"

namespace mm {

struct DeviceOptions {
  std::string device = "auto";  // auto: a GPU if one is usable, else the CPU (said in the log); cpu; cuda
  std::string dtype = "auto";   // auto: bf16 on a GPU, f32 on the CPU; f32, bf16, and on a GPU f16
  // GPU: the unfused variants that the fused ones are compared with
  bool naive_norm = false, naive_attention = false, naive_ce = false;
};

size_t kernel_scratch_bytes(const Device& dev);  // GPU memory that the kernels keep beside the tensors they are given

// Owns what `device` points to. Move only.
class OpenDevice {
 public:
  explicit OpenDevice(const DeviceOptions& options = {});  // Error with the reason when it cannot be had
  ~OpenDevice();
  OpenDevice(OpenDevice&&) noexcept;
  Device device;

 private:
  std::unique_ptr<cuda::Session> session_;
};

}  // namespace mm
