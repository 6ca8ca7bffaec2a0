// A typed window on memory that somebody else owns: what ops take and files give.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "base/error.h"
#include "tensor/dtype.h"

namespace mm {

struct Shape {
  static constexpr int max_dims = 4;
  int ndim = 0;
  std::array<int64_t, max_dims> dim{};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    MM_CHECK(dims.size() <= max_dims);
    for (const int64_t d : dims) dim[static_cast<size_t>(ndim++)] = d;
  }
  int64_t operator[](int i) const { return dim[static_cast<size_t>(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= dim[static_cast<size_t>(i)];
    return n;
  }
  bool operator==(const Shape& o) const = default;
  std::string str() const {  // "[2, 64]"
    std::string s = "[";
    for (int i = 0; i < ndim; i++) s += (i > 0 ? ", " : "") + std::to_string((*this)[i]);
    return s + "]";
  }
};

// Row-major; rows (index 0) may lie further apart than their length: `ld` elements from one row to the next.
// Everything below the first dimension is contiguous. Copying a View copies no data. Unowned, no thread rule of its
// own.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  int64_t ld = 0;

  View() = default;
  View(void* p, DType t, Shape s) : data(p), dtype(t), shape(s), ld(s.ndim > 0 && s[0] != 0 ? s.numel() / s[0] : 0) {
    if (s.ndim > 0 && s[0] == 0) {
      ld = 1;
      for (int i = 1; i < s.ndim; i++) ld *= s[i];
    }
  }
  explicit operator bool() const { return data != nullptr; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t rows() const { return shape.ndim > 0 ? shape[0] : 1; }
  int64_t cols() const {  // elements in a row
    int64_t n = 1;
    for (int i = 1; i < shape.ndim; i++) n *= shape[i];
    return n;
  }
  int64_t numel() const { return shape.numel(); }
  bool contiguous() const { return ld == cols() || rows() <= 1; }
  size_t bytes() const { return static_cast<size_t>(numel()) * dtype_size(dtype); }

  template <class T>
  T* as() const {  // checked cast: as<float>() needs f32, as<uint16_t>() f16 or bf16, as<int32_t>() i32
    constexpr bool is_float = std::is_same_v<std::remove_const_t<T>, float>;
    MM_CHECK(is_float ? dtype == DType::f32 : sizeof(T) == dtype_size(dtype), "view is {}", dtype_name(dtype));
    return static_cast<T*>(data);
  }
  float* f32() const { return as<float>(); }

  View row_slice(int64_t begin, int64_t end) const {  // rows [begin, end)
    MM_CHECK(begin >= 0 && begin <= end && end <= rows());
    View v = *this;
    v.data = static_cast<char*>(data) + static_cast<size_t>(begin * ld) * dtype_size(dtype);
    v.shape.dim[0] = end - begin;
    return v;
  }
  View col_slice(int64_t begin, int64_t end) const {  // columns [begin, end) of a 2-d view, keeping ld
    MM_CHECK(shape.ndim == 2 && begin >= 0 && begin <= end && end <= shape[1]);
    View v = *this;
    v.data = static_cast<char*>(data) + static_cast<size_t>(begin) * dtype_size(dtype);
    v.shape.dim[1] = end - begin;
    return v;
  }
  View reshape(Shape s) const {  // contiguous views only
    MM_CHECK(contiguous() && s.numel() == numel(), "{} to {}", shape.str(), s.str());
    return View(data, dtype, s);
  }
};

}  // namespace mm
