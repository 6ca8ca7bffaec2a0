// Where memory lies and how it is copied between host and GPU. Without CUDA in the build the GPU kinds end in an Error.
#pragma once

#include <cstddef>
#include <string>

struct CUstream_st;

namespace mm {

enum class Memory { host, pinned, cuda };  // pinned: host memory that the GPU copies from and to without waiting

// What the GPU can be used for, asked once. `why_not` names the reason where there is none usable.
struct CudaStatus {
  bool usable = false;
  std::string name, why_not;
  int arch = 0;  // compute capability times 10
  int n_sm = 0;
  size_t total_bytes = 0;
};
const CudaStatus& cuda_status();
size_t cuda_free_bytes();      // now; 0 without a GPU
size_t device_bytes_in_use();  // allocated here as Memory::cuda and not released

// Host memory of twice that or more comes in pages of this size, each when it is first touched.
constexpr size_t large_page = size_t{2} << 20;

void* allocate(size_t bytes, Memory where);  // zeroed; Error with what was asked and what is free
void release(void* p, size_t bytes, Memory where) noexcept;

// One after another on the stream; pageable host memory makes the call wait.
void copy_async(void* to, const void* from, size_t bytes, CUstream_st* stream);
void synchronize(CUstream_st* stream);

// A point on a stream that the host can wait for. Move only; of a build with CUDA alone.
class Fence {
 public:
  Fence() = default;
  ~Fence();  // NOLINT(performance-trivially-destructible): not trivial with CUDA
  Fence(Fence&& o) noexcept : event_(o.event_) { o.event_ = nullptr; }
  Fence& operator=(Fence&&) = delete;
  void record(CUstream_st* stream);
  void wait();  // returns at once when nothing was recorded

 private:
  void* event_ = nullptr;
};

}  // namespace mm
