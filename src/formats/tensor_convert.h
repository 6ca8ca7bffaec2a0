// Conversions between float and the element types of weight files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tensor/view.h"

namespace mm {

// f32, f16, bf16 and f64 can be converted; integers cannot.
bool is_float_dtype(DType t);

// Converts n contiguous elements. `src` and `dst` need no alignment (weight files may lack it). Any thread.
void to_float(const void* src, DType src_type, float* dst, int64_t n);
// Target f32, f16 or bf16. Returns the index of the first finite value that overflows to infinity in f16, else -1.
int64_t from_float(const float* src, void* dst, DType dst_type, int64_t n);

// Copies `src` (any float dtype, rows possibly strided, possibly unaligned) into `dst` (f32, rows possibly strided)
// with all cores. Shapes must have equal rows() and cols(); MM_CHECK otherwise.
void copy_to_float(const View& src, const View& dst);

}  // namespace mm
