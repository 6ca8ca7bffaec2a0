#include "model/staged_batch.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/error.h"

namespace mm {

static constexpr size_t n_blocks = 4;

BatchStage::Layout BatchStage::layout(int64_t max_tok) {
  Layout l{};
  size_t at = 0;
  const auto take = [&](int64_t n, size_t size) {
    const size_t begin = at;
    at = (at + static_cast<size_t>(n) * size + 255) / 256 * 256;
    return begin;
  };
  l.share = take(1, 4);
  l.n_tiles = take(1, 4);
  l.ids = take(max_tok, 4);
  l.positions = take(max_tok, 4);
  l.targets = take(max_tok, 4);
  l.g = take(max_tok, 4);
  l.cu = take(max_tok + 1, 4);
  l.tiles = take(2 * max_tok, 4);  // at worst every token is a sequence
  l.slots = take(max_tok, 8);
  l.kv_start = take(max_tok, 4);
  l.kv_len = take(max_tok, 4);
  l.end = at;
  return l;
}

BatchStage::BatchStage(const Device& dev, int64_t max_tok, int64_t n_kv_head)
    : max_tok_(max_tok), n_kv_head_(n_kv_head) {
  if (!dev.on_gpu() || max_tok == 0) return;
  const size_t bytes = layout(max_tok).end;
  gpu_ = Buffer(bytes, Memory::cuda);
  for (size_t i = 0; i < n_blocks; i++) blocks_.emplace_back(bytes, Memory::pinned);
  fences_.resize(n_blocks);
}

const StagedBatch& BatchStage::stage(const Device& dev, const TokenBatch& b, const KvCache::Plan* cache,
                                     std::span<const float> g, float share, bool bucketed) {
  double pairs = 0, keys = 0;
  int64_t max_len = 0;
  for (int64_t s = 0; s < b.n_seq(); s++) {
    const auto i = static_cast<size_t>(s);
    const double q = b.cu_seqlens[i + 1] - b.cu_seqlens[i], kv = cache != nullptr ? cache->kv_len[i] : q;
    pairs += q * (kv - q) + q * (q + 1) / 2;
    keys += kv;
    max_len = std::max(max_len, static_cast<int64_t>(q));
  }
  share_ = share;
  staged_ = {.ids = b.ids.data(),
             .positions = b.positions.data(),
             .targets = b.targets.empty() ? nullptr : b.targets.data(),
             .g = g.data(),
             .share = &share_,
             .cu_seqlens = b.cu_seqlens.data(),
             .slots = cache != nullptr ? cache->slots.data() : nullptr,
             .kv_start = cache != nullptr ? cache->kv_start.data() : nullptr,
             .kv_len = cache != nullptr ? cache->kv_len.data() : nullptr,
             .n_tok = b.n_tok(),
             .n_seq = b.n_seq()};
  if (dev.on_gpu()) stage_on_gpu(dev, b, cache, g, share, bucketed);
  staged_.pairs = pairs;
  staged_.keys = keys;
  staged_.max_len = max_len;
  return staged_;
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void BatchStage::stage_on_gpu(const Device& dev, const TokenBatch& b, const KvCache::Plan* cache,
                              std::span<const float> g, float share, bool bucketed) {
  constexpr int64_t pad_len = tile_rows;
  const int64_t real = b.n_tok();
  MM_CHECK(real <= max_tok_, "{} tokens, planned for {}", real, max_tok_);
  const int64_t n_tok = bucketed ? std::min(max_tok_, round_up(real, std::max<int64_t>(pad_len, max_tok_ / 8))) : real;
  const Layout l = layout(max_tok_);
  fences_[turn_].wait();
  char* block = static_cast<char*>(blocks_[turn_].data());
  const auto put = [&](size_t at, const void* from, size_t bytes) { std::memcpy(block + at, from, bytes); };
  const auto ints = [&](size_t at) { return reinterpret_cast<int32_t*>(block + at); };
  const auto n = static_cast<size_t>(real);
  put(l.share, &share, sizeof(share));
  put(l.ids, b.ids.data(), 4 * n);
  put(l.positions, b.positions.data(), 4 * n);
  if (!b.targets.empty()) put(l.targets, b.targets.data(), 4 * n);
  if (!g.empty()) put(l.g, g.data(), 4 * n);
  put(l.cu, b.cu_seqlens.data(), 4 * b.cu_seqlens.size());
  int64_t n_seq = b.n_seq();
  for (int64_t t = real; t < n_tok; t++) {  // short sequences of their own: finite, cheap, without a target
    ints(l.ids)[t] = 0;
    ints(l.positions)[t] = static_cast<int32_t>((t - real) % pad_len);
    ints(l.targets)[t] = -1;
    reinterpret_cast<float*>(block + l.g)[t] = 0.0f;
    if ((t + 1 - real) % pad_len == 0 || t + 1 == n_tok) ints(l.cu)[++n_seq] = static_cast<int32_t>(t + 1);
  }
  const int32_t* cu = ints(l.cu);
  std::vector<int32_t> order(static_cast<size_t>(n_seq));
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int32_t s) { return cu[s + 1] - cu[s]; };
  std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return length(x) > length(y); });
  int32_t n_tiles = 0, *tiles = ints(l.tiles);
  for (const int32_t s : order) {
    for (int64_t row = round_up(length(s), tile_rows) - tile_rows; row >= 0; row -= tile_rows, n_tiles++) {
      tiles[2 * n_tiles] = s;
      tiles[2 * n_tiles + 1] = static_cast<int32_t>(row);
    }
  }
  // Blocks take tiles in turn, for every kv head. A long tile among the last would leave the others waiting, so the
  // last 400 items go by length alone, where the first keep a sequence's keys in the cache (B32 T768 H8/4 d96: forward
  // 76 us instead of 87, backward 225 instead of 250).
  struct Tile {
    int32_t seq, row;
  };
  auto* const tile = reinterpret_cast<Tile*>(tiles);
  const bool hopper = cuda_status().arch == 90;  // elsewhere length alone wins (the portable kernels: 6 to 35 %)
  const auto tail = hopper ? std::min<int64_t>(n_tiles, 400 / n_kv_head_) : n_tiles;
  std::stable_sort(tile + n_tiles - tail, tile + n_tiles, [](const Tile& x, const Tile& y) { return x.row > y.row; });
  put(l.n_tiles, &n_tiles, sizeof(n_tiles));
  int64_t max_tiles = n_tiles;
  if (bucketed) {
    max_tiles = round_up(n_tiles, std::max<int64_t>(32, max_tok_ / tile_rows / 2));
    while (n_seq < max_tok_) ints(l.cu)[++n_seq] = static_cast<int32_t>(n_tok);  // empty ones: the same number always
  }
  if (cache != nullptr) {
    const KvCache::Plan& p = *cache;
    put(l.slots, p.slots.data(), 8 * p.slots.size());
    put(l.kv_start, p.kv_start.data(), 4 * p.kv_start.size());
    put(l.kv_len, p.kv_len.data(), 4 * p.kv_len.size());
  }
  copy_async(gpu_.data(), block, cache != nullptr ? l.end : l.slots, dev.stream);
  fences_[turn_].record(dev.stream);
  turn_ = (turn_ + 1) % n_blocks;

  const char* base = static_cast<const char*>(gpu_.data());
  const auto gpu_ints = [&](size_t at) { return reinterpret_cast<const int32_t*>(base + at); };
  staged_ = {.ids = gpu_ints(l.ids),
             .positions = gpu_ints(l.positions),
             .targets = b.targets.empty() ? nullptr : gpu_ints(l.targets),
             .g = reinterpret_cast<const float*>(base + l.g),
             .share = reinterpret_cast<const float*>(base + l.share),
             .cu_seqlens = gpu_ints(l.cu),
             .slots = cache != nullptr ? reinterpret_cast<const int64_t*>(base + l.slots) : nullptr,
             .kv_start = cache != nullptr ? gpu_ints(l.kv_start) : nullptr,
             .kv_len = cache != nullptr ? gpu_ints(l.kv_len) : nullptr,
             .tiles = gpu_ints(l.tiles),
             .n_tiles = gpu_ints(l.n_tiles),
             .n_tok = n_tok,
             .n_seq = n_seq,
             .max_tiles = max_tiles};
}

}  // namespace mm
