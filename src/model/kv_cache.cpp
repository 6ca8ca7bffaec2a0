#include "model/kv_cache.h"

#include "base/error.h"

namespace mm {

size_t KvCache::bytes(const ModelConfig& c, int64_t n_slots, int64_t max_len, DType dtype) {
  return static_cast<size_t>(2 * c.num_hidden_layers * n_slots * max_len * c.kv_width()) * dtype_size(dtype);
}

KvCache::KvCache(const ModelConfig& c, int64_t n_slots, int64_t max_len, const Device& dev)
    : n_slots_(n_slots),
      max_len_(max_len),
      width_(c.kv_width()),
      dtype_(dev.act),
      length_(static_cast<size_t>(n_slots), 0),
      buffer_(bytes(c, n_slots, max_len, dev.act), dev.memory()) {
  MM_CHECK(n_slots > 0 && max_len > 0 && n_slots * max_len <= INT32_MAX);
}

View KvCache::rows(int64_t index) const {  // k of layer 0, v of layer 0, k of layer 1, ...
  const int64_t n = n_slots_ * max_len_;
  return View(static_cast<char*>(buffer_.data()) + static_cast<size_t>(index * n * width_) * dtype_size(dtype_), dtype_,
              {n, width_});
}

View KvCache::k(int64_t layer) const { return rows(2 * layer); }
View KvCache::v(int64_t layer) const { return rows(2 * layer + 1); }

void KvCache::truncate(int64_t slot, int64_t length) {
  MM_CHECK(slot >= 0 && slot < n_slots_ && length >= 0 && length <= length_[static_cast<size_t>(slot)]);
  length_[static_cast<size_t>(slot)] = length;
}

void KvCache::append(TokenBatch& batch, int64_t slot, const int32_t* ids, int64_t n) {
  MM_CHECK(slot >= 0 && slot < n_slots_ && n > 0);
  int64_t& length = length_[static_cast<size_t>(slot)];
  if (length + n > max_len_)
    throw Error("sequence length", fmt::format("at most {} tokens", max_len_), std::to_string(length + n),
                "shorten the prompt or ask for fewer tokens");
  if (batch.cu_seqlens.empty()) batch.cu_seqlens.push_back(0);
  plan_.kv_start.push_back(static_cast<int32_t>(slot * max_len_));
  plan_.kv_len.push_back(static_cast<int32_t>(length + n));
  for (int64_t i = 0; i < n; i++) {
    batch.ids.push_back(ids[i]);
    batch.positions.push_back(static_cast<int32_t>(length + i));
    plan_.slots.push_back(slot * max_len_ + length + i);
  }
  batch.cu_seqlens.push_back(static_cast<int32_t>(batch.n_tok()));
  length += n;
}

}  // namespace mm
