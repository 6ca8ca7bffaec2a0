#include "tensor/host_copy.h"

#include <cstring>

namespace mm {

std::vector<float> host_floats(const Device& dev, const View& v) {
  MM_CHECK(v.contiguous());
  std::vector<float> out(static_cast<size_t>(v.numel()));
  std::vector<uint16_t> half;
  void* raw = out.data();
  if (v.dtype != DType::f32) {
    MM_CHECK(v.dtype == DType::bf16 || v.dtype == DType::f16, "{}", dtype_name(v.dtype));
    half.resize(out.size());
    raw = half.data();
  }
  if (out.empty()) return out;
  if (dev.on_gpu()) {
    copy_async(raw, v.data, v.bytes(), dev.stream);
    synchronize(dev.stream);
  } else {
    std::memcpy(raw, v.data, v.bytes());
  }
  for (size_t i = 0; i < half.size(); i++)
    out[i] = v.dtype == DType::bf16 ? bf16_to_float(half[i]) : f16_to_float(half[i]);
  return out;
}

void copy_from_host(const Device& dev, const View& to, const std::vector<float>& from) {
  MM_CHECK(to.contiguous() && to.numel() == static_cast<int64_t>(from.size()));
  std::vector<uint16_t> half;
  const void* raw = from.data();
  if (to.dtype != DType::f32) {
    MM_CHECK(to.dtype == DType::bf16 || to.dtype == DType::f16, "{}", dtype_name(to.dtype));
    half.resize(from.size());
    for (size_t i = 0; i < half.size(); i++)
      half[i] = to.dtype == DType::bf16 ? float_to_bf16(from[i]) : float_to_f16(from[i]);
    raw = half.data();
  }
  if (dev.on_gpu()) {
    copy_async(to.data, raw, to.bytes(), dev.stream);
    synchronize(dev.stream);
  } else if (!from.empty()) {
    std::memcpy(to.data, raw, to.bytes());
  }
}

}  // namespace mm
