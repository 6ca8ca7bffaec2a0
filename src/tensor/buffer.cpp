#include "tensor/buffer.h"

#include "base/error.h"

namespace mm {

Buffer::Buffer(size_t bytes, Memory where) : size_(bytes), where_(where) {
  if (bytes > 0) data_ = std::unique_ptr<void, Free>(allocate(bytes, where), Free{bytes, where});
}

void Buffer::Free::operator()(void* p) const { release(p, bytes, where); }

View Arena::take(DType t, Shape s) {
  const size_t offset = used_;
  const size_t bytes = static_cast<size_t>(s.numel()) * dtype_size(t);
  used_ += (bytes + alignment - 1) / alignment * alignment;
  if (base_ == nullptr) return View(nullptr, t, s);
  MM_CHECK(used_ <= size_, "arena of {} bytes asked for {}", size_, used_);
  return View(base_ + offset, t, s);
}

}  // namespace mm
