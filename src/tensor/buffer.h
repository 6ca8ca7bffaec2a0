// Owned memory, and an arena that hands out views of one allocation.
#pragma once

#include <cstddef>
#include <memory>

#include "tensor/memory.h"
#include "tensor/view.h"

namespace mm {

// 64-byte aligned at least, zero-initialised (on the host by fresh pages from the system, so untouched parts cost no
// memory). Move only.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, Memory where = Memory::host);  // Error with the size when the system refuses
  void* data() const { return data_.get(); }
  float* f32() const { return static_cast<float*>(data_.get()); }
  size_t size() const { return size_; }
  Memory where() const { return where_; }

 private:
  struct Free {
    size_t bytes;
    Memory where;
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_{nullptr, Free{0, Memory::host}};
  size_t size_ = 0;
  Memory where_ = Memory::host;
};

// Two passes over the same code: the first with a null base adds up the bytes, the second hands out views. Offsets are
// multiples of 256 bytes, which suits every copy engine. Not thread safe.
class Arena {
 public:
  Arena() = default;  // counting pass
  explicit Arena(const Buffer& buffer) : base_(static_cast<char*>(buffer.data())), size_(buffer.size()) {}
  View take(DType t, Shape s);
  size_t used() const { return used_; }
  void rewind(size_t to) { used_ = to; }  // reuse what was taken after a mark

 private:
  static constexpr size_t alignment = 256;
  char* base_ = nullptr;
  size_t used_ = 0, size_ = 0;
};

}  // namespace mm
