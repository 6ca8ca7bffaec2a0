// A batch where the device reads it: on the CPU the arrays themselves, on a GPU a copy at fixed addresses, so that a
// captured graph finds the next batch there.
#pragma once

#include <span>
#include <vector>

#include "model/kv_cache.h"
#include "tensor/buffer.h"
#include "tensor/device.h"
#include "tensor/token_batch.h"

namespace mm {

struct StagedBatch {
  const int32_t *ids = nullptr, *positions = nullptr, *targets = nullptr;  // [n_tok]
  const float* g = nullptr;                                                // [n_tok] dL/dlogp, see objective.h
  const float* share = nullptr;                                            // [1] see BatchStage::stage
  const int32_t* cu_seqlens = nullptr;                                     // [n_seq + 1]
  const int64_t* slots = nullptr;                                          // [n_tok] with a cache, as the next two
  const int32_t *kv_start = nullptr, *kv_len = nullptr;                    // [n_seq]
  const int32_t *tiles = nullptr, *n_tiles = nullptr;                      // GPU: attention's work list
  int64_t n_tok = 0, n_seq = 0, max_tiles = 0, max_len = 0;
  double pairs = 0, keys = 0;  // see ops::Attention
};

class BatchStage {
 public:
  static constexpr int64_t tile_rows = 128;

  BatchStage() = default;
  // n_kv_head shapes the end of attention's work list.
  BatchStage(const Device& dev, int64_t max_tok, int64_t n_kv_head);
  // The batch must outlive the use of the result on the CPU. g (may be empty): dL/dlogp of every token; share: this
  // micro-batch's part of the step, scales the balance loss. bucketed (GPU, no cache): tokens and work list are padded
  // to a few sizes with sequences that nothing looks at, so that few graphs serve all batches.
  const StagedBatch& stage(const Device& dev, const TokenBatch& batch, const KvCache::Plan* cache,
                           std::span<const float> g = {}, float share = 1.0f, bool bucketed = false);
  static size_t gpu_bytes(const Device& dev, int64_t max_tok) { return dev.on_gpu() ? layout(max_tok).end : 0; }
  const StagedBatch& current() const { return staged_; }

 private:
  void stage_on_gpu(const Device& dev, const TokenBatch& batch, const KvCache::Plan* cache, std::span<const float> g,
                    float share, bool bucketed);
  struct Layout {  // byte offsets in a block
    size_t ids, positions, targets, g, share, n_tiles, cu, tiles, slots, kv_start, kv_len, end;
  };
  static Layout layout(int64_t max_tok);
  StagedBatch staged_;
  int64_t max_tok_ = 0, n_kv_head_ = 1;
  float share_ = 1.0f;
  Buffer gpu_;
  // Blocks filled in turn: the copy of one may be under way while the next is written.
  std::vector<Buffer> blocks_;
  std::vector<Fence> fences_;
  size_t turn_ = 0;
};

}  // namespace mm
