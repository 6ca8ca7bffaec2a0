#include "kernels/cuda/session.h"

#include "base/error.h"
#include "kernels/cuda/cuda_check.h"
#include "tensor/memory.h"

namespace mm::cuda {

static constexpr size_t scratch_bytes = size_t{64} << 20;

Session::Session() {
  const CudaStatus& gpu = cuda_status();
  if (!gpu.usable) throw Error("--device", "a GPU of compute capability 8.0 or more", gpu.why_not, "use --device cpu");
  ctx.arch = gpu.arch;
  ctx.n_sm = gpu.n_sm;
  MM_CUDA_CHECK(cudaStreamCreateWithFlags(&ctx.stream, cudaStreamNonBlocking));
  ctx.scratch = allocate(scratch_bytes, Memory::cuda);
  ctx.scratch_bytes = scratch_bytes;
  gemm_ = std::make_unique<Gemm>(ctx);
}

Session::~Session() {
  gemm_.reset();
  if (ctx.scratch != nullptr) release(ctx.scratch, ctx.scratch_bytes, Memory::cuda);
  if (ctx.stream != nullptr) (void)cudaStreamDestroy(ctx.stream);
}

Graph::~Graph() {
  if (exec_ != nullptr) (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec_));
}

void Graph::begin(Session& s) { MM_CUDA_CHECK(cudaStreamBeginCapture(s.ctx.stream, cudaStreamCaptureModeThreadLocal)); }

Graph Graph::end(Session& s) {
  cudaGraph_t graph = nullptr;
  MM_CUDA_CHECK(cudaStreamEndCapture(s.ctx.stream, &graph));
  Graph g;
  cudaGraphExec_t exec = nullptr;
  const cudaError_t e = cudaGraphInstantiate(&exec, graph, 0);
  (void)cudaGraphDestroy(graph);
  MM_CUDA_CHECK(e);
  g.exec_ = exec;
  return g;
}

void Graph::abandon(Session& s) noexcept {
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(s.ctx.stream, &graph) == cudaSuccess && graph != nullptr) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}

void Graph::launch(Session& s) const {
  MM_CUDA_CHECK(cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec_), s.ctx.stream));
}

}  // namespace mm::cuda
