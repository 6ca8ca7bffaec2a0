// Host side of the Hopper GEMM: tensor maps, tile shape, launch. Kernel: hopper_gemm.cuh.
#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/hopper_gemm.cuh"
#include "kernels/cuda/hopper_gemm.h"

namespace mm::cuda {

namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Through the runtime, so that the program needs no libcuda to start.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    MM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result));
#else
    MM_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &result));
#endif
    if (f == nullptr) fail("cuTensorMapEncodeTiled", "the driver has none", __FILE__, __LINE__);
    return reinterpret_cast<EncodeTiled>(f);
  }();
  return function;
}

// bf16 [depth][rows][width], rows ld and planes `plane` elements apart, read in boxes of box_rows x 64.
CUtensorMap tensor_map(const void* p, int64_t width, int64_t rows, int64_t ld, int64_t depth, int64_t plane,
                       int box_rows) {
  const auto u64 = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const cuuint64_t size[3] = {u64(width), u64(std::max<int64_t>(rows, 1)), u64(depth)};
  const cuuint64_t bytes[2] = {u64(2 * ld), u64(depth > 1 ? 2 * plane : 2 * ld)};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1}, step[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult r =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), size, bytes, box, step,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled", "refused", __FILE__, __LINE__);
  return map;
}

// cluster: in pairs of blocks; otherwise after the kernel before, whose blocks make room as they leave.
void launch(const Context& ctx, void (*kernel)(GemmParams), dim3 blocks, unsigned threads, size_t shared,
            const GemmParams& p, bool cluster) {
  if (shared > 0)
    MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchAttribute attribute{};
  if (cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 2, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = p.pdl;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  MM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

template <int kN>
void run(const Context& ctx, const HopperGemm& g, GemmParams& p) {
  const bool k_major = g.layout == GemmLayout::fwd;
  const auto clusters = static_cast<unsigned>(ctx.n_sm / 2);
  constexpr size_t kShared = GemmTile<kN>::shared_bytes;
  if (g.layout == GemmLayout::wgrad) {
    p.a = tensor_map(g.a, g.m, g.k, g.lda, 1, 0, 64);
    p.b = tensor_map(g.b, g.n, g.k, g.ldb, 1, 0, 32);
    SegmentPlan& plan = p.plan;
    plan.experts = p.experts;
    plan.tiles = static_cast<int>(div_up(g.m, 256) * div_up(g.n, kN));
    plan.clusters = static_cast<int>(clusters);
    if (g.offset == nullptr) make_dense_plan(plan, static_cast<int>(div_up(g.k, kGemmBlockK)));
    const size_t need = static_cast<size_t>(plan.slots()) * 256 * kN * sizeof(float);
    if (need > ctx.scratch_bytes) fail("scratch memory", "too small", __FILE__, __LINE__);
    p.partial = static_cast<float*>(ctx.scratch);
    launch(ctx, hopper_gemm_kernel<kN, GemmLayout::wgrad, GemmKind::add_f32, false>, dim3(2 * clusters), 384, kShared, p,
           true);
    if (plan.slots() == 0) return;
    launch(ctx, hopper_gemm_add_slots<kN>,
           dim3(static_cast<unsigned>(plan.tiles), kN / 16 * 4, static_cast<unsigned>(p.experts.n_expert)), 128, 0, p,
           false);
    return;
  }
  p.a = tensor_map(g.a, g.k, g.m, g.lda, 1, 0, 128);
  p.b = k_major ? tensor_map(g.b, g.k, g.n, g.ldb, g.n_expert, g.stride, kN / 2)
                : tensor_map(g.b, g.n, g.k, g.ldb, g.n_expert, g.stride, 32);
  const auto start = [&](auto kernel) { launch(ctx, kernel, dim3(2 * clusters), 384, kShared, p, true); };
  if (g.epilogue == GemmEpilogue::swiglu) {
    if constexpr (kN == 256)
      start(g.defer ? hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::swiglu, true>
                    : hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::swiglu, false>);
  } else if (g.epilogue == GemmEpilogue::residual) {
    if (g.defer)
      start(k_major ? hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::residual, true>
                    : hopper_gemm_kernel<kN, GemmLayout::dgrad, GemmKind::residual, true>);
    else
      start(k_major ? hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::residual, false>
                    : hopper_gemm_kernel<kN, GemmLayout::dgrad, GemmKind::residual, false>);
  } else if (g.defer) {
    start(k_major ? hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::store, true>
                  : hopper_gemm_kernel<kN, GemmLayout::dgrad, GemmKind::store, true>);
  } else {
    start(k_major ? hopper_gemm_kernel<kN, GemmLayout::fwd, GemmKind::store, false>
                  : hopper_gemm_kernel<kN, GemmLayout::dgrad, GemmKind::store, false>);
  }
}

// Columns of a tile: the fewest rounds of all clusters, weighed by the width (narrow tiles read more for what they
// compute) and the time to change tiles.
int choose_tile(const Context& ctx, const HopperGemm& g) {
  if (g.epilogue == GemmEpilogue::swiglu) return 256;
  int best = 256;
  double best_cost = 0;
  const double clusters = ctx.n_sm / 2;
  for (const int n : {256, 192, 128}) {
    const double efficiency = n == 256 ? 1.0 : n == 192 ? 0.97 : 0.88;
    const auto columns = static_cast<double>(div_up(g.n, n));
    double cost;
    if (g.layout == GemmLayout::wgrad) {
      cost = columns * n / efficiency;
    } else {
      const double tiles = (static_cast<double>(div_up(g.m, 256)) + 0.5 * (g.n_expert - 1)) * columns;
      cost = std::ceil(tiles / clusters) * n / efficiency;
    }
    if (best_cost == 0 || cost < best_cost) best = n, best_cost = cost;
  }
  return best;
}

bool multiple_of_16_bytes(int64_t elements) { return elements % 8 == 0; }

HopperGemm with_strides(HopperGemm g) {
  if (g.lda == 0) g.lda = g.layout == GemmLayout::wgrad ? g.m : g.k;
  if (g.ldb == 0) g.ldb = g.layout == GemmLayout::fwd ? g.k : g.n;
  if (g.ldo == 0) g.ldo = g.n;
  if (g.ldr == 0) g.ldr = g.ldo;
  return g;
}

}  // namespace

bool hopper_gemm_fits(const Context& ctx, const HopperGemm& given) {
  const HopperGemm g = with_strides(given);
  if (ctx.arch != 90 || ctx.n_sm < 2) return false;
  if (!aligned({g.a, g.b, g.out, g.residual, g.act})) return false;
  const bool wgrad = g.layout == GemmLayout::wgrad;
  if (g.epilogue == GemmEpilogue::swiglu && (g.n % 16 != 0 || g.layout != GemmLayout::fwd)) return false;
  if (wgrad && g.epilogue != GemmEpilogue::store) return false;
  // Without a row or a step there is nothing to launch, but something to write.
  if (g.m < 1 || g.n < 1 || g.k < 1) return false;
  constexpr int64_t kLimit = int64_t{1} << 30;
  return multiple_of_16_bytes(g.lda) && multiple_of_16_bytes(g.ldb) && multiple_of_16_bytes(g.ldo) &&
         multiple_of_16_bytes(g.ldr) && multiple_of_16_bytes(g.stride) && multiple_of_16_bytes(g.n) &&
         (wgrad ? multiple_of_16_bytes(g.m) : multiple_of_16_bytes(g.k)) && g.m < kLimit && g.n < kLimit &&
         g.k < kLimit;
}

void hopper_gemm(const Context& ctx, const HopperGemm& given) {
  const HopperGemm g = with_strides(given);
  if (g.m < 1 || g.n < 1 || g.k < 1) return;
  GemmParams p{};
  p.out = g.out;
  p.residual = g.residual;
  p.act = g.act;
  p.ldo = g.ldo, p.ldr = g.ldr, p.stride = g.stride;
  p.m = static_cast<int>(g.m), p.n = static_cast<int>(g.n), p.k = static_cast<int>(g.k);
  p.experts = {g.offset, g.offset == nullptr ? 1 : g.n_expert,
               static_cast<int>(g.layout == GemmLayout::wgrad ? g.k : g.m)};
  if (g.epilogue == GemmEpilogue::swiglu) p.n /= 2;
  p.ahead = g.ahead, p.out_ahead = g.out_ahead, p.pdl = g.pdl;
  switch (g.tile_n != 0 && g.epilogue != GemmEpilogue::swiglu ? g.tile_n : choose_tile(ctx, g)) {
    case 128: run<128>(ctx, g, p); break;
    case 192: run<192>(ctx, g, p); break;
    default: run<256>(ctx, g, p);
  }
}

}  // namespace mm::cuda
