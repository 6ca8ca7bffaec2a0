#include "formats/tensor_convert.h"

#include <cmath>
#include <cstring>

#include "base/thread_team.h"

namespace mm {

bool is_float_dtype(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16 || t == DType::f64; }

template <class From, class Convert>
static void convert(const void* src, float* dst, int64_t n, Convert f) {
  const char* p = static_cast<const char*>(src);
  for (int64_t i = 0; i < n; i++) {
    From v;
    std::memcpy(&v, p + static_cast<size_t>(i) * sizeof(From), sizeof(From));
    dst[i] = f(v);
  }
}

void to_float(const void* src, DType src_type, float* dst, int64_t n) {
  if (n == 0) return;
  switch (src_type) {
    case DType::f32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
    case DType::f16: convert<uint16_t>(src, dst, n, [](uint16_t v) { return f16_to_float(v); }); return;
    case DType::bf16: convert<uint16_t>(src, dst, n, [](uint16_t v) { return bf16_to_float(v); }); return;
    case DType::f64: convert<double>(src, dst, n, [](double v) { return static_cast<float>(v); }); return;
    default: MM_CHECK(false, "{} is no float type", dtype_name(src_type));
  }
}

int64_t from_float(const float* src, void* dst, DType dst_type, int64_t n) {
  if (n == 0) return -1;
  int64_t overflow = -1;
  if (dst_type == DType::f32) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
  } else if (dst_type == DType::bf16) {
    uint16_t* out = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; i++) out[i] = float_to_bf16(src[i]);
  } else {
    MM_CHECK(dst_type == DType::f16, "cannot write {}", dtype_name(dst_type));
    uint16_t* out = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; i++) {
      out[i] = float_to_f16(src[i]);
      if ((out[i] & 0x7fffu) == 0x7c00u && std::isfinite(src[i]) && overflow < 0) overflow = i;
    }
  }
  return overflow;
}

void copy_to_float(const View& src, const View& dst) {
  MM_CHECK(src.rows() == dst.rows() && src.cols() == dst.cols(), "{} into {}", src.shape.str(), dst.shape.str());
  MM_CHECK(dst.dtype == DType::f32, "target is {}", dtype_name(dst.dtype));
  MM_CHECK(is_float_dtype(src.dtype), "source is {}", dtype_name(src.dtype));
  const char* in = static_cast<const char*>(src.data);
  float* out = static_cast<float*>(dst.data);
  const size_t size = dtype_size(src.dtype);
  constexpr int64_t grain = 1 << 16;  // elements a thread at least, so that small tensors do not wake the team
  if (src.contiguous() && dst.contiguous()) {
    parallel_for(src.numel(), grain, [&](int64_t begin, int64_t end) {
      to_float(in + static_cast<size_t>(begin) * size, src.dtype, out + begin, end - begin);
    });
    return;
  }
  const int64_t cols = src.cols();
  parallel_for(src.rows(), 1 + grain / (cols + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      to_float(in + static_cast<size_t>(r * src.ld) * size, src.dtype, out + r * dst.ld, cols);
  });
}

}  // namespace mm
