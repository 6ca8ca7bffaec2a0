// One kernel for a whole decode step; see the contract in infer_kernels.h.
//
// One block an SM. Each stage's weight rows are dealt out to the blocks beforehand and packed so that a block's share
// of the whole model is one contiguous stream, in the order in which it is used (decode_persistent.cuh). It passes
// through a ring in shared memory (bulk copies; cp.async below sm_90) of 100 to 200 KB, more than a layer ahead of the
// products, so memory does not idle while blocks exchange activations. The stages:
//
//   qkv       x -> qkv words          every block norms the whole x itself (the root of the mean square is applied
//                                     behind the product)
//   attention qkv -> merged or parts  a block a (token, key head, share of the keys); old keys are prefetched a layer
//                                     ahead
//   merge     parts -> merged         where a row's keys were split
//   o         merged, x -> mid
//   gate_up   mid -> act              4 rows of gate and the same 4 of up a tile
//   down      act, mid -> out = next x
//   head      x -> logits -> draw, a block a row
//
// Before a stage waits for its input it takes its weights into registers. Inputs are polled words in L2
// (decode_persistent.cuh): no barrier over the grid. Products by mma.sync m16n8k16 with weights as the A operand; the
// warps split k, their sums meet in shared memory, always in the same order.
//
// One row of a model whose shape is known has a script of its own: decode_persistent_row.cuh, _alone.cuh.
//
// Bytes a step: all weights once, keys and values once, a few KB of activations a block.
//
// Measured on an H100, greedy draw inside, in a graph, us a step at depth 60 / 1,000 / 4,000: minimind-3 bf16, one row
// 92 / 143 / 181, 4 rows 158 / 202 / 302, 8 rows 196 / 271 / 466; int8 weights, one row 104 / 154 / 176;
// minimind2-small bf16, one row 68 / 82 / 131, int8 67 / 82 / 129. Weights alone would take 43 us (3.0 TB/s, minimind-3
// bf16); with no weights copied one row took 84 us, with nobody waiting for anybody 47. What limits it is 40 hand-overs
// between blocks of some 1,000 clocks, and the latency of a stage's instructions. Draws with temperature cost 2 us
// more, with top-k and top-p 7 us.
//
// Tried: 18 warps with copying and resetting in warps of their own and all shapes in one kernel 220 us; 16 warps and
// own kernels for two shapes 130 us; bulk copies issued between a stage's barriers by one warp cost 1,500 clocks a
// stage, by four warps behind them nothing; code of its own for each stage (fewer jumps, 75 KB instead of 50) 130 us
// instead of 118 (768 wide) but 80 instead of 86 (512 wide); fewer copies in flight no difference (and a deadlock where
// a pass needs more); a plain launch instead of a graph no difference. One row: a ninth warp for copies leaves 168
// registers a thread, what spills doubles every stage (129 us instead of 111); attention's maxima and sums on one cache
// line that all blocks poll 121 us, on lines of their own 111.
#include "kernels/cuda/decode_persistent_kernel.cuh"
#include "kernels/cuda/decode_persistent_plan.cuh"
#include "tensor/memory.h"

namespace mm::cuda {

using namespace persistent;

struct PersistentDecode {
  Params params;
  int grid = 0, arch = 0, shared_limit = 0;
  WeightFormat format = WeightFormat::bf16;
  struct Block {
    void* p;
    size_t bytes;
  };
  std::vector<Block> memory;

  template <class T>
  T* take(size_t count) {
    const size_t bytes = std::max<size_t>(count * sizeof(T), 256);
    void* p = allocate(bytes, Memory::cuda);
    memory.push_back({p, bytes});
    return static_cast<T*>(p);
  }
};

namespace {

// --- packing ------------------------------------------------------------------------------------------------------
// One matrix into the stream: tile t begins at unit begin[t]. half > 0: tiles of 4 rows t * 4.. and the 4 rows `half`
// below them. grid: tiles.
template <WeightFormat kFormat>
__global__ void pack_kernel(unsigned char* stream, const uint32_t* begin, const void* data, const f16* scales,
                            int64_t n, int64_t k, int64_t half) {
  const int64_t tile = blockIdx.x;
  const int units = static_cast<int>(k / unit_k(kFormat));
  unsigned char* to = stream + static_cast<int64_t>(begin[tile]) * unit_bytes(kFormat);
  for (int i = static_cast<int>(threadIdx.x); i < units * 32; i += static_cast<int>(blockDim.x)) {
    const int unit = i / 32, lane = i % 32, g = lane / 4, t = lane % 4;
    const int64_t row = half > 0 ? tile * 4 + g % 4 + (g < 4 ? 0 : half) : tile * 8 + g;
    uint4 w = make_uint4(0, 0, 0, 0);
    uint32_t scale = 0;
    if (row < n) {
      if constexpr (kFormat == WeightFormat::i8) {
        const int8_t* from = static_cast<const int8_t*>(data) + row * k + unit * 64 + t * 8;
        const uint2 a = *reinterpret_cast<const uint2*>(from), b = *reinterpret_cast<const uint2*>(from + 32);
        w = make_uint4(a.x, a.y, b.x, b.y);
        scale = *reinterpret_cast<const uint32_t*>(scales + row * (k / 32) + unit * 2);
      } else {
        const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(data) + row * k + unit * 32 + t * 8);
        w = make_uint4(x.x, x.z, x.y, x.w);
      }
    }
    unsigned char* at = to + static_cast<int64_t>(unit) * unit_bytes(kFormat);
    reinterpret_cast<uint4*>(at)[lane] = w;
    if (kFormat == WeightFormat::i8 && t == 0) reinterpret_cast<uint32_t*>(at + 512)[g] = scale;
  }
}

void pack(const Context& ctx, WeightFormat format, unsigned char* stream, const uint32_t* begin, const InferMatrix& m,
          int64_t tiles, int64_t half) {
  const auto kernel = format == WeightFormat::i8 ? pack_kernel<WeightFormat::i8> : pack_kernel<WeightFormat::bf16>;
  kernel<<<static_cast<unsigned>(tiles), 256, 0, ctx.stream>>>(stream, begin, m.data, static_cast<const f16*>(m.scales),
                                                               m.n, m.k, half);
  MM_CUDA_LAUNCHED();
}

// --- what can run -------------------------------------------------------------------------------------------------
const char* unsupported(const Context& ctx, const InferModel& m, const InferKv& kv,
                        const PersistentDecodeLimits& limits) {
  if (ctx.arch < 80) return "the GPU is older than compute capability 8.0";
  if (m.n_expert > 0) return "a mixture of experts";
  if (m.n_layer < 1 || m.n_layer > max_layers) return "more than 64 layers";
  if (limits.max_rows < 1 || limits.max_rows > max_tokens) return "more than 8 rows";
  if (kv.format != KvFormat::bf16 && kv.format != KvFormat::i8) return "keys and values are neither bf16 nor int8";
  const WeightFormat f = m.head.format;
  if (f != WeightFormat::bf16 && f != WeightFormat::i8) return "weights are neither bf16 nor int8";
  if (m.embed.format != WeightFormat::bf16 && m.embed.format != WeightFormat::f32 && m.embed.format != WeightFormat::i8)
    return "the embedding is neither bf16, fp32 nor int8";
  if (m.d_head != 32 && m.d_head != 64 && m.d_head != 96 && m.d_head != 128) return "d_head is not 32, 64, 96 or 128";
  const int group = m.n_head / m.n_kv_head;
  if (m.n_head % m.n_kv_head != 0 || (group != 1 && group != 2 && group != 4)) return "not 1, 2 or 4 heads a key head";
  if (m.d_ff % 8 != 0) return "d_ff is not a multiple of 8";
  const auto fits = [&](const InferMatrix& w) {
    return w.format == f && w.k % unit_k(f) == 0 &&
           units_per_warp(static_cast<int>(w.k / unit_k(f))) <= most_units_per_warp;
  };
  for (int64_t l = 0; l < m.n_layer; l++) {
    const InferLayer& a = m.layers[l];
    if (!fits(a.qkv) || !fits(a.o) || !fits(a.gate_up) || !fits(a.down))
      return "a weight's width is too large or no multiple of 64, or formats are mixed";
  }
  if (!fits(m.head)) return "the head's width is too large or no multiple of 64";
  return nullptr;
}

Kernel kernel_of(WeightFormat format, const Params& p) {
  return format == WeightFormat::i8 ? kernel_of_i8(p) : kernel_of_bf16(p);
}

template <class T>
void upload(const Context& ctx, T* to, const std::vector<T>& from) {
  MM_CUDA_CHECK(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, ctx.stream));
}

void plan_exchange(PersistentDecode& d) {
  Params& p = d.params;
  Exchange& ex = p.ex;
  const int64_t rows = p.max_rows, width = p.n_head * p.d_head, group = p.n_head / p.n_kv_head;
  int64_t at = 0;
  const auto piece = [&](int64_t words) {
    const int64_t begin = at;
    at += words;
    return begin;
  };
  ex.part_words = static_cast<int>(align_up(static_cast<size_t>(group * (p.d_head + 2)), 4));
  const int64_t row_words = 2 * row_splits(p.n_kv_head) * width;
  p.n_row_parts = static_cast<int>(div_up(row_words, ex.part_words));
  ex.n_parts = std::max({d.grid, p.max_rows * p.n_kv_head, p.n_row_parts});
  ex.qkv = piece(rows * (width + 2 * p.n_kv_head * p.d_head));
  ex.parts = piece(int64_t{ex.n_parts} * ex.part_words);
  ex.merged = piece(rows * width / 2);
  ex.mid = piece(rows * p.d_model);
  ex.act = piece(rows * p.d_ff / 2);
  ex.out = piece(rows * p.d_model);
  ex.layer_words = at;
  ex.logits = at * p.n_layer;
  ex.logit_words = static_cast<int>(align_up(static_cast<size_t>(p.n_vocab), 8));
  ex.stream = ex.logits + rows * ex.logit_words;
  ex.set_words = ex.stream + static_cast<int64_t>(align_up(static_cast<size_t>(p.d_model), 4));
  auto* words = d.take<uint32_t>(static_cast<size_t>(2 * ex.set_words));
  ex.set[0] = words, ex.set[1] = words + ex.set_words;
}

}  // namespace

PersistentDecode* persistent_decode_create(const Context& ctx, const InferModel& m, const InferKv& kv,
                                           const PersistentDecodeLimits& limits, const char** why) {
  *why = unsupported(ctx, m, kv, limits);
  if (*why != nullptr) return nullptr;
  int device = 0, shared_limit = 0, cooperative = 0;
  MM_CUDA_CHECK(cudaGetDevice(&device));
  MM_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  MM_CUDA_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  if (cooperative == 0) {
    *why = "the GPU cannot start all blocks of a kernel at once";
    return nullptr;
  }
  auto* d = new PersistentDecode();
  const auto give_up = [&](const char* reason) {
    persistent_decode_destroy(d);
    *why = reason;
    return static_cast<PersistentDecode*>(nullptr);
  };
  d->format = m.head.format, d->arch = ctx.arch, d->shared_limit = shared_limit - 1024;
  d->grid = static_cast<int>(std::min<int64_t>(ctx.n_sm, m.d_ff / 4));
  Params& p = d->params;
  p = Params();
  p.d_model = static_cast<int>(m.d_model), p.d_ff = static_cast<int>(m.d_ff), p.n_layer = static_cast<int>(m.n_layer);
  p.n_vocab = static_cast<int>(m.n_vocab), p.n_head = m.n_head, p.n_kv_head = m.n_kv_head, p.d_head = m.d_head;
  p.eps = m.eps, p.scale2 = m.attention_scale * log2_e;
  p.max_rows = static_cast<int>(limits.max_rows);
  p.inv_d = 1.0f / static_cast<float>(p.d_model), p.qkv_width = (p.n_head + 2 * p.n_kv_head) * p.d_head;
  p.sum_stride = static_cast<int>(align_up(static_cast<size_t>(div_up(p.d_model, 128)), 4));
  p.cos = m.cos, p.sin = m.sin;
  p.embed = m.embed.data, p.embed_scales = m.embed.scales, p.embed_format = m.embed.format;
  p.kv_format = kv.format, p.k = kv.k, p.v = kv.v, p.k_scale = kv.k_scale, p.v_scale = kv.v_scale;
  p.kv_layer_stride = kv.layer_stride;
  if (known_shape(p) != 0 && d->grid >= 8 * attention_blocks && d->shared_limit >= alone_bytes)
    p.n_attention = attention_blocks;
  const int uk = unit_k(d->format);
  const InferMatrix* of_stage[5] = {&m.layers[0].qkv, &m.layers[0].o, &m.layers[0].gate_up, &m.layers[0].down, &m.head};
  for (int i = 0; i < 5; i++) p.shape[i] = {static_cast<int>(of_stage[i]->k / uk), 0, static_cast<int>(of_stage[i]->k)};
  if (p.max_rows * p.n_kv_head > d->grid) return give_up("too few multiprocessors for so many key heads");
  std::vector<int> tiles, units;
  for (int64_t l = 0; l <= m.n_layer; l++) {
    for (int i = 0; i < 4 && l < m.n_layer; i++) {
      const int64_t n = i == 0   ? m.layers[l].qkv.n
                        : i == 1 ? m.layers[l].o.n
                        : i == 2 ? 2 * m.d_ff
                                 : m.layers[l].down.n;
      tiles.push_back(static_cast<int>(div_up(n, rows_per_tile))), units.push_back(p.shape[i].units);
    }
  }
  tiles.push_back(static_cast<int>(div_up(m.n_vocab, rows_per_tile))), units.push_back(p.shape[stage_head].units);
  const Deal deal = deal_out(d->grid, p.n_attention, tiles, units);
  const auto passes_of = [&](int block, int ring) {
    return plan_passes(deal, units, d->format, static_cast<uint32_t>(ring), static_cast<size_t>(block));
  };
  for (int b = 0; b < d->grid; b++) p.n_pass = std::max(p.n_pass, static_cast<int>(passes_of(b, alone_bytes).size()));
  bool scores_fit = true;
  for (int n = p.n_attention > 0 ? 0 : 1; n <= p.max_rows; n++) {
    p.n_tok = std::max(n, 1), p.roles = n == 0;
    if (!plan_shared(p, d->format, d->shared_limit))
      return give_up("the shared memory of a multiprocessor is too small");
    const Kernel kernel = kernel_of(d->format, p);
    MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.smem.bytes));
    const int room = p.roles ? alone_bytes : p.smem.n_slots * slot_units * unit_bytes(d->format);
    scores_fit &= draw_bytes + align_up(static_cast<size_t>(p.n_vocab), 8) * 4 <= static_cast<size_t>(room);
    int resident = 0;
    MM_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, n_thread, static_cast<size_t>(p.smem.bytes)));
    if (resident < 1) return give_up("the kernel does not fit a multiprocessor");
    MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d->shared_limit));
  }

  // Weights.
  auto* segments = d->take<int2>(deal.segments.size());
  auto* block_begin = d->take<uint32_t>(deal.block_begin.size());
  auto* tile_begin = d->take<uint32_t>(deal.tile_begin.size());
  if (p.n_attention > 0) {
    std::vector<RowPass> passes;
    for (int b = 0; b < d->grid; b++) {
      const auto of_block = passes_of(b, plan_row(p).ring);
      passes.insert(passes.end(), of_block.begin(), of_block.end());
      passes.resize(static_cast<size_t>(b + 1) * static_cast<size_t>(p.n_pass), of_block.back());
    }
    auto* to = d->take<RowPass>(passes.size());
    MM_CUDA_CHECK(cudaMemcpy(to, passes.data(), passes.size() * sizeof(RowPass), cudaMemcpyHostToDevice));
    p.passes = to;
  }
  auto* stream = d->take<unsigned char>(size_t{deal.block_begin.back()} * static_cast<size_t>(unit_bytes(d->format)));
  p.norm_stride = p.d_model * 2 + (m.layers[0].q_norm != nullptr ? 2 * p.d_head : 0);
  p.norm_q = m.layers[0].q_norm != nullptr ? 2 * p.d_model : -1;
  auto* norms = d->take<float>(static_cast<size_t>(p.n_layer * p.norm_stride + p.d_model));
  p.state = d->take<State>(1);
  plan_exchange(*d);
  if (!scores_fit) p.scores = d->take<float>(static_cast<size_t>(p.max_rows) * static_cast<size_t>(p.ex.logit_words));
  MM_CUDA_CHECK(cudaDeviceSynchronize());  // the zeroing of fresh memory is on another stream
  MM_CUDA_CHECK(cudaMemsetAsync(p.ex.set[0], 0xff, static_cast<size_t>(2 * p.ex.set_words) * 4, ctx.stream));
  upload(ctx, segments, deal.segments);
  upload(ctx, block_begin, deal.block_begin);
  upload(ctx, tile_begin, deal.tile_begin);
  p.segments = segments, p.block_begin = block_begin, p.stream = stream, p.norms = norms;
  const auto copy_norm = [&](int64_t at, const float* from, int64_t n) {
    MM_CUDA_CHECK(cudaMemcpyAsync(norms + at, from, static_cast<size_t>(n) * 4, cudaMemcpyDeviceToDevice, ctx.stream));
  };
  for (int64_t l = 0; l < m.n_layer; l++) {
    const InferLayer& a = m.layers[l];
    const InferMatrix* w[4] = {&a.qkv, &a.o, &a.gate_up, &a.down};
    for (size_t i = 0; i < 4; i++) {
      const size_t s = static_cast<size_t>(4 * l) + i;
      pack(ctx, d->format, stream, tile_begin + deal.segment_tiles[s], *w[i], tiles[s],
           i == stage_gate_up ? m.d_ff : 0);
    }
    copy_norm(l * p.norm_stride, a.input_norm, m.d_model);
    copy_norm(l * p.norm_stride + m.d_model, a.post_norm, m.d_model);
    if (p.norm_q >= 0) {
      copy_norm(l * p.norm_stride + p.norm_q, a.q_norm, m.d_head);
      copy_norm(l * p.norm_stride + p.norm_q + m.d_head, a.k_norm, m.d_head);
    }
  }
  pack(ctx, d->format, stream, tile_begin + deal.segment_tiles.back(), m.head, tiles.back(), 0);
  copy_norm(m.n_layer * p.norm_stride, m.final_norm, m.d_model);
  MM_CUDA_CHECK(cudaStreamSynchronize(ctx.stream));
  // L2 keeps this much of the weights from step to step; more is slower.
  const size_t weight_bytes = size_t{deal.block_begin.back()} * static_cast<size_t>(unit_bytes(d->format));
  p.resident_16ths =
      static_cast<int>(std::min<size_t>(16, (16 * (size_t{26} << 20) + weight_bytes / 2) / weight_bytes));
  return d;
}

void persistent_decode_destroy(PersistentDecode* d) noexcept {
  if (d == nullptr) return;
  for (const auto& b : d->memory) release(b.p, b.bytes, Memory::cuda);
  delete d;
}

void persistent_decode_run(const Context& ctx, PersistentDecode* d, const PersistentStepBatch& step) {
  if (step.rows.empty()) return;
  Params p = d->params;
  p.n_tok = static_cast<int>(step.rows.size());
  if (p.n_tok > p.max_rows || (!step.sampling.empty() && step.sampling.size() != step.rows.size()))
    fail("persistent decode", "more rows than it was made for, or not a draw for each", __FILE__, __LINE__);
  std::copy(step.rows.begin(), step.rows.end(), p.rows);
  std::copy(step.sampling.begin(), step.sampling.end(), p.sampling);
  p.roles = p.n_tok == 1 && p.n_attention > 0 && p.rows[0].kv_len <= row_splits(p.n_kv_head) * alone_most_keys;
  p.max_split = p.roles ? row_splits(p.n_kv_head) : d->grid / (p.n_tok * p.n_kv_head);
  plan_shared(p, d->format, d->shared_limit);
  p.prev_ids = step.prev_ids;
  p.table = step.table, p.table_ld = step.table_ld, p.block_shift = step.block_shift;
  p.logits = step.logits, p.hidden = step.hidden;
  p.draw = !step.sampling.empty();
  p.edits = step.edits, p.masks = step.masks;
  p.next_ids = step.next_ids, p.next_ids_host = step.next_ids_host;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(d->grid));
  config.blockDim = dim3(n_thread);
  config.dynamicSmemBytes = static_cast<size_t>(p.smem.bytes);
  config.stream = ctx.stream;
  config.attrs = &together;
  config.numAttrs = 1;
  MM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel_of(d->format, p), p));
}

}  // namespace mm::cuda
