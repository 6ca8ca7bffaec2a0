#include "tensor/buffer.h"

#include <sys/mman.h>

#include "base/error.h"
#include "base/progress.h"

namespace mm {

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    size_ = 0;
    throw Error("memory", human_bytes(static_cast<double>(bytes)) + " from the system", "a refusal",
                "use a smaller model, batch or sequence length");
  }
  // Large pages spare TLB misses on weights and activations; a refusal does not matter.
  if (bytes >= size_t{4} << 20) ::madvise(p, bytes, MADV_HUGEPAGE);
  data_ = std::unique_ptr<void, Free>(p, Free{bytes});
}

void Buffer::Free::operator()(void* p) const { ::munmap(p, bytes); }

View Arena::take(DType t, Shape s) {
  const size_t offset = used_;
  const size_t bytes = static_cast<size_t>(s.numel()) * dtype_size(t);
  used_ += (bytes + 63) / 64 * 64;
  if (base_ == nullptr) return View(nullptr, t, s);
  MM_CHECK(used_ <= size_, "arena of {} bytes asked for {}", size_, used_);
  return View(base_ + offset, t, s);
}

}  // namespace mm
