// Element types of buffers and files, and scalar conversions between the 16-bit ones and float.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

namespace mm {

enum class DType : uint8_t { f32, f16, bf16, f64, i64, i32, i16, i8, u8, boolean };

size_t dtype_size(DType t);
const char* dtype_name(DType t);                 // "f32", "bf16", ...
DType dtype_from_name(const std::string& name);  // Error on an unknown one

inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
float f16_to_float(uint16_t h);
uint16_t float_to_f16(float f);  // round to nearest even; overflow to infinity

}  // namespace mm
