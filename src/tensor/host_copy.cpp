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
  for (size_t i = 0; i < half.size(); i++) out[i] = v.dtype == DType::bf16 ? bf16_to_float(half[i]) : f16_to_float(half[i]);
  return out;
}

}  // namespace mm
