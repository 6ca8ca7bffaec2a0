#include "kernels/open_device.h"

#include "base/error.h"
#include "base/log.h"
#include "kernels/kernel_table.h"
#ifdef MM_CUDA
#include "kernels/cuda/session.h"
#else
namespace mm::cuda {
class Session {};
}  // namespace mm::cuda
#endif

namespace mm {

OpenDevice::OpenDevice(const DeviceOptions& o) {
  const CudaStatus& gpu = cuda_status();
  if (o.device == "cuda" && !gpu.usable) throw Error("--device cuda", "a usable GPU", gpu.why_not, "use --device cpu");
  const bool on_gpu = o.device == "cuda" || (o.device == "auto" && gpu.usable);
#ifdef MM_CUDA
  if (!on_gpu && o.device == "auto") log_info("no usable GPU ({}); the CPU computes", gpu.why_not);
  if (on_gpu) {
    session_ = std::make_unique<cuda::Session>();
    session_->ctx.naive_norm = o.naive_norm;
    session_->ctx.naive_attention = o.naive_attention;
    session_->ctx.naive_ce = o.naive_ce;
    device.kind = DeviceKind::cuda;
    device.cuda = session_.get();
    device.stream = session_->ctx.stream;
    device.act = o.dtype == "auto" ? DType::bf16 : dtype_from_name(o.dtype);
    device.matmul = device.act;
    return;
  }
#endif
  MM_CHECK(!on_gpu);
  device.matmul = o.dtype == "auto" ? DType::f32 : dtype_from_name(o.dtype);
  if (device.matmul == DType::f16) throw Error("--dtype", "f32 or bf16 on the CPU", "f16");
  if (device.matmul == DType::bf16 && !matmul_bf16_available())
    throw Error("--dtype", "f32 on this processor", "bf16", "bf16 products need AVX-512 BF16");
}

size_t kernel_scratch_bytes(const Device& dev) {
#ifdef MM_CUDA
  if (dev.on_gpu()) return dev.cuda->ctx.scratch_bytes + cuda::Gemm::workspace_bytes();
#endif
  (void)dev;
  return 0;
}

OpenDevice::~OpenDevice() = default;
OpenDevice::OpenDevice(OpenDevice&&) noexcept = default;

}  // namespace mm
