#include "engine/block_pool.h"

#include <algorithm>

#include "base/error.h"

namespace mm {

static uint64_t hash_of(BlockPool::Content before, std::span<const int32_t> tokens) {
  uint64_t h = before * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u;
  for (const int32_t t : tokens) {
    h = (h ^ static_cast<uint32_t>(t)) * 0xFF51AFD7ED558CCDu;
    h ^= h >> 32;
  }
  return h;
}

BlockPool::BlockPool(int64_t n_block, int64_t block_size)
    : block_size_(block_size), blocks_(static_cast<size_t>(n_block)) {
  MM_CHECK(n_block > 0 && n_block <= INT32_MAX && block_size > 0);
  free_.reserve(blocks_.size());
  for (int64_t b = n_block - 1; b >= 0; b--) free_.push_back(static_cast<int32_t>(b));
}

const BlockPool::Block& BlockPool::at(int32_t block) const {
  MM_CHECK(block >= 0 && block < n_block());
  return blocks_[static_cast<size_t>(block)];
}
BlockPool::Block& BlockPool::at(int32_t block) {
  MM_CHECK(block >= 0 && block < n_block());
  return blocks_[static_cast<size_t>(block)];
}

void BlockPool::forget(int32_t block) {
  Block& b = at(block);
  const auto [begin, end] = by_hash_.equal_range(b.hash);
  const auto it = std::find_if(begin, end, [&](const auto& entry) { return entry.second == block; });
  MM_CHECK(it != end);
  by_hash_.erase(it);
  b.content = 0;
  b.tokens.clear();
}

std::optional<int32_t> BlockPool::allocate() {
  int32_t block = -1;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else if (!lru_.empty()) {
    block = lru_.front();
    lru_.pop_front();
    at(block).cached = false;
    forget(block);
  } else {
    return std::nullopt;
  }
  at(block).users = 1;
  return block;
}

void BlockPool::retain(int32_t block) {
  Block& b = at(block);
  if (b.users++ > 0) return;
  MM_CHECK(b.cached);
  lru_.erase(b.lru);
  b.cached = false;
}

void BlockPool::release(int32_t block) {
  Block& b = at(block);
  MM_CHECK(b.users > 0);
  if (--b.users > 0) return;
  if (b.content == 0) {
    free_.push_back(block);
    return;
  }
  b.lru = lru_.insert(lru_.end(), block);
  b.cached = true;
}

BlockPool::Content BlockPool::publish(int32_t block, Content before, std::span<const int32_t> tokens) {
  MM_CHECK(static_cast<int64_t>(tokens.size()) == block_size_);
  if (const auto known = find(before, tokens)) return known->content;
  Block& b = at(block);
  MM_CHECK(b.users > 0 && b.content == 0);
  b.before = before;
  b.content = next_content_++;
  b.tokens.assign(tokens.begin(), tokens.end());
  b.hash = hash_of(before, tokens);
  by_hash_.emplace(b.hash, block);
  return b.content;
}

std::optional<BlockPool::Found> BlockPool::find(Content before, std::span<const int32_t> tokens) const {
  const auto [begin, end] = by_hash_.equal_range(hash_of(before, tokens));
  for (auto it = begin; it != end; ++it) {
    const Block& b = at(it->second);
    if (b.before == before && std::equal(tokens.begin(), tokens.end(), b.tokens.begin(), b.tokens.end()))
      return Found{it->second, b.content};
  }
  return std::nullopt;
}

void BlockPool::check() const {
  std::vector<int> state(blocks_.size(), 0);
  for (const int32_t b : free_) {
    state[static_cast<size_t>(b)]++;
    MM_CHECK(at(b).users == 0 && !at(b).cached && at(b).content == 0, "free block {}", b);
  }
  for (const int32_t b : lru_) {
    state[static_cast<size_t>(b)]++;
    MM_CHECK(at(b).users == 0 && at(b).cached && at(b).content != 0, "cached block {}", b);
  }
  size_t findable = 0;
  for (size_t b = 0; b < blocks_.size(); b++) {
    MM_CHECK(state[b] == (blocks_[b].users > 0 ? 0 : 1), "block {} is in {} lists", b, state[b]);
    findable += blocks_[b].content != 0;
  }
  MM_CHECK(findable == by_hash_.size());
}

}  // namespace mm
