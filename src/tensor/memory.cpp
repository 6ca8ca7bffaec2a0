#include "tensor/memory.h"

#include <sys/mman.h>

#include <atomic>

#include "base/error.h"
#include "base/progress.h"

#ifdef MM_CUDA
#include <cuda_runtime.h>
#endif

namespace mm {

static std::atomic<size_t> g_device_bytes{0};
size_t device_bytes_in_use() { return g_device_bytes; }

// Large pages spare TLB misses on weights, activations, keys and values. The system gives them for whole, aligned 2 MB.
static bool in_large_pages(size_t bytes) { return bytes >= 2 * large_page; }
static size_t mapped_bytes(size_t bytes) {
  return in_large_pages(bytes) ? (bytes + large_page - 1) / large_page * large_page : bytes;
}

static void unmap_host(void* p, size_t bytes) { ::munmap(p, mapped_bytes(bytes)); }

static void* map_host(size_t bytes) {
  const size_t size = mapped_bytes(bytes), more = in_large_pages(bytes) ? large_page : 0;
  void* p = ::mmap(nullptr, size + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    throw Error("memory", human_bytes(static_cast<double>(bytes)) + " from the system", "a refusal",
                "use a smaller model, batch or sequence length");
  }
  if (more == 0) return p;
  char* const begin = static_cast<char*>(p);
  const size_t before = (large_page - reinterpret_cast<uintptr_t>(p) % large_page) % large_page;
  if (before > 0) ::munmap(begin, before);
  if (more > before) ::munmap(begin + before + size, more - before);
  ::madvise(begin + before, size, MADV_HUGEPAGE);  // a refusal does not matter
  return begin + before;
}

#ifdef MM_CUDA

static CudaStatus ask_cuda() {
  CudaStatus s;
  int count = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess) {
    s.why_not = cudaGetErrorString(e);
    return s;
  }
  cudaDeviceProp p{};
  if (count == 0 || cudaGetDeviceProperties(&p, 0) != cudaSuccess) {
    s.why_not = "no GPU was found";
    return s;
  }
  s.arch = p.major * 10 + p.minor;
  s.name = p.name;
  s.n_sm = p.multiProcessorCount;
  s.total_bytes = p.totalGlobalMem;
  if (s.arch < 80) s.why_not = fmt::format("{} has compute capability {}.{}; 8.0 is needed", s.name, p.major, p.minor);
  s.usable = s.arch >= 80;
  return s;
}

const CudaStatus& cuda_status() {
  static const CudaStatus status = ask_cuda();
  return status;
}

size_t cuda_free_bytes() {
  size_t free = 0, total = 0;
  return cuda_status().usable && cudaMemGetInfo(&free, &total) == cudaSuccess ? free : 0;
}

static void require(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw Error(std::string("CUDA: ") + what, "success", cudaGetErrorString(e));
}

void* allocate(size_t bytes, Memory where) {
  if (where == Memory::host) return map_host(bytes);
  void* p = nullptr;
  const cudaError_t e = where == Memory::cuda ? cudaMalloc(&p, bytes) : cudaMallocHost(&p, bytes);
  if (e == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // it stays set otherwise
    throw Error(where == Memory::cuda ? "GPU memory" : "pinned memory",
                human_bytes(static_cast<double>(bytes)) + " in one piece",
                human_bytes(static_cast<double>(cuda_free_bytes())) + " free on the GPU",
                "lower --batch-size, --seq-len or --pass-tokens, pass --recompute ffn, or use a smaller model");
  }
  require(e, "allocation");
  require(cudaMemset(p, 0, bytes), "memset");
  // The sessions' streams do not wait for the default one, on which the zeros are written.
  if (where == Memory::cuda) require(cudaDeviceSynchronize(), "memset");
  if (where == Memory::cuda) g_device_bytes += bytes;
  return p;
}

void release(void* p, size_t bytes, Memory where) noexcept {
  if (where == Memory::host) unmap_host(p, bytes);
  else if (where == Memory::cuda) (void)cudaFree(p), g_device_bytes -= bytes;
  else (void)cudaFreeHost(p);
}

void copy_async(void* to, const void* from, size_t bytes, CUstream_st* stream) {
  if (bytes > 0) require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copy");
}

void synchronize(CUstream_st* stream) { require(cudaStreamSynchronize(stream), "kernels before this point"); }

Fence::~Fence() {
  if (event_ != nullptr) (void)cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

void Fence::record(CUstream_st* stream) {
  cudaEvent_t e = static_cast<cudaEvent_t>(event_);
  if (e == nullptr) require(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "event");
  event_ = e;
  require(cudaEventRecord(e, stream), "event");
}

void Fence::wait() {
  if (event_ != nullptr) require(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)), "kernels before this point");
}

#else

const CudaStatus& cuda_status() {
  static const CudaStatus status{.why_not = "this binary was built without CUDA (`make cuda` builds one with)"};
  return status;
}

size_t cuda_free_bytes() { return 0; }

void* allocate(size_t bytes, Memory where) {
  MM_CHECK(where == Memory::host, "a build without CUDA");
  return map_host(bytes);
}

void release(void* p, size_t bytes, Memory) noexcept { unmap_host(p, bytes); }
void copy_async(void*, const void*, size_t, CUstream_st*) { MM_CHECK(false, "a build without CUDA"); }
void synchronize(CUstream_st*) { MM_CHECK(false, "a build without CUDA"); }
Fence::~Fence() = default;
void Fence::record(CUstream_st*) { MM_CHECK(false, "a build without CUDA"); }
void Fence::wait() {}

#endif

}  // namespace mm
