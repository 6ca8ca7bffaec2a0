// Host side of the Hopper GEMM: tensor maps, tile shape, launch. Kernel: hopper_gemm.cuh.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/hopper_gemm.cuh"
#include "kernels/cuda/hopper_gemm.h"
#include "kernels/cuda/tensor_map.h"

namespace mm::cuda {

namespace {

// bf16 [depth][rows][width], rows ld and planes `plane` elements apart, read in boxes of box_rows x 64 (k-major), or of
// blocks x box_rows x 64, one block of 64 columns after the other.
struct Matrix {
  const void* p;
  int64_t width, rows, ld, depth = 1, plane = 0;
};
CUtensorMap tensor_map(const Matrix& m, bool k_major, int box_rows, int blocks) {
  const auto u64 = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const cuuint64_t row = u64(2 * m.ld), plane = u64(m.depth > 1 ? 2 * m.plane : 2 * m.ld);
  const cuuint64_t k_size[4] = {u64(m.width), u64(m.rows), u64(m.depth), 1}, k_bytes[3] = {row, plane, plane};
  const cuuint64_t mn_size[4] = {64, u64(m.rows), u64(m.width / 64), u64(m.depth)}, mn_bytes[3] = {row, 128, plane};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(blocks), 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult r =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(m.p), k_major ? k_size : mn_size,
                     k_major ? k_bytes : mn_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled", "refused", __FILE__, __LINE__);
  return map;
}

// In clusters of two blocks, one block an SM.
void launch(const Context& ctx, void (*kernel)(GemmParams), size_t shared, const GemmParams& p) {
  MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctx.n_sm / 2 * 2));
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  MM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

// The better of the plans with and without helpers.
struct CostedPlan {
  SegmentPlan plan;
  double cost = 0;
};
CostedPlan make_plan(const Context& ctx, const HopperGemm& g, int tile_n) {
  CostedPlan best;
  SegmentPlan plan;
  plan.experts = {g.offset, g.offset == nullptr ? 1 : g.n_expert, static_cast<int>(g.k)};
  plan.tiles = static_cast<int>(div_up(g.m, 256) * div_up(g.n, tile_n));
  plan.clusters = ctx.n_sm / 2;
  if (g.offset != nullptr)
    return {plan, static_cast<double>(div_up(g.n, tile_n) * tile_n) * (tile_n == 256   ? 1.0
                                                                       : tile_n == 192 ? 1.05
                                                                                       : 1.12)};
  const int blocks = static_cast<int>(div_up(g.k, kGemmBlockK));
  for (const bool helpers : {false, true}) {
    make_dense_plan(plan, blocks, helpers);
    const double cost = plan_cost(plan, blocks, tile_n);
    if (best.cost == 0 || cost < best.cost) best = {plan, cost};
  }
  return best;
}

template <int kN>
void run(const Context& ctx, const HopperGemm& g, GemmParams& p) {
  const bool k_major = g.layout == GemmLayout::fwd;
  constexpr size_t kShared = GemmTile<kN, GemmKind::store>::shared_bytes;
  const auto start = [&](auto kernel, size_t shared) { launch(ctx, kernel, shared, p); };
  if (g.layout == GemmLayout::wgrad) {
    p.a = tensor_map({g.a, g.m, g.k, g.lda}, false, 64, 2);
    p.b = tensor_map({g.b, g.n, g.k, g.ldb}, false, 32, kN / 64);
    p.plan = make_plan(ctx, g, kN).plan;
    const SegmentPlan& plan = p.plan;
    const size_t need = static_cast<size_t>(plan.slots()) * 256 * kN * sizeof(float);
    if (need > ctx.scratch_bytes) fail("scratch memory", "too small", __FILE__, __LINE__);
    p.partial = static_cast<float*>(ctx.scratch);
    start(hopper_gemm_kernel<kN, GemmLayout::wgrad, GemmKind::add_f32>, kShared);
    if (plan.slots() == 0 || max_cut_experts(plan) == 0) return;
    const dim3 blocks(static_cast<unsigned>(plan.tiles), 32, static_cast<unsigned>(max_cut_experts(plan)));
    hopper_gemm_add_slots<kN><<<blocks, 128, 0, ctx.stream>>>(p);
    MM_CUDA_LAUNCHED();
    return;
  }
  p.a = tensor_map({g.a, g.k, g.m, g.lda}, true, 128, 1);
  p.b = k_major ? tensor_map({g.b, g.k, g.n, g.ldb, g.n_expert, g.stride}, true, kN / 2, 1)
                : tensor_map({g.b, g.n, g.k, g.ldb, g.n_expert, g.stride}, false, 32, kN / 64);
  using enum GemmKind;
  using enum GemmLayout;
  if (g.epilogue == GemmEpilogue::swiglu) {
    if constexpr (kN == 256) start(hopper_gemm_kernel<kN, fwd, swiglu>, kShared);
  } else if (g.epilogue == GemmEpilogue::swiglu_bwd) {
    if constexpr (kN == 192) start(hopper_gemm_kernel<kN, dgrad, swiglu_bwd>, GemmTile<kN, swiglu_bwd>::shared_bytes);
  } else if (g.epilogue == GemmEpilogue::residual) {
    start(k_major ? hopper_gemm_kernel<kN, fwd, residual> : hopper_gemm_kernel<kN, dgrad, residual>, kShared);
  } else {
    start(k_major ? hopper_gemm_kernel<kN, fwd, store> : hopper_gemm_kernel<kN, dgrad, store>, kShared);
  }
}

// Columns of a tile: the fewest rounds of all clusters, weighed by the width (narrow tiles read more for what they
// compute) and the time to change tiles.
int choose_tile(const Context& ctx, const HopperGemm& g) {
  if (g.epilogue == GemmEpilogue::swiglu) return 256;
  if (g.epilogue == GemmEpilogue::swiglu_bwd) return 192;
  int best = 256;
  double best_cost = 0;
  const double clusters = ctx.n_sm / 2;
  for (const int n : {256, 192, 128}) {
    const double efficiency = n == 256 ? 1.0 : n == 192 ? 0.97 : 0.88;
    const auto columns = static_cast<double>(div_up(g.n, n));
    double cost;
    if (g.layout == GemmLayout::wgrad) {
      cost = make_plan(ctx, g, n).cost;
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
  if (g.ldo == 0) g.ldo = g.epilogue == GemmEpilogue::swiglu_bwd ? 2 * g.n : g.n;
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
  if (g.epilogue == GemmEpilogue::swiglu_bwd && g.layout != GemmLayout::dgrad) return false;
  // The operands that are read along m or n come in blocks of 64 columns.
  if (g.layout != GemmLayout::fwd && (g.n % 64 != 0 || (wgrad && g.m % 64 != 0))) return false;
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
  const bool fixed = g.epilogue == GemmEpilogue::swiglu || g.epilogue == GemmEpilogue::swiglu_bwd;
  switch (g.tile_n != 0 && !fixed ? g.tile_n : choose_tile(ctx, g)) {
    case 128: run<128>(ctx, g, p); break;
    case 192: run<192>(ctx, g, p); break;
    default: run<256>(ctx, g, p);
  }
}

}  // namespace mm::cuda
