// Physical blocks of keys and values: who uses them, and which may be shared because they hold the same tokens.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace mm {

// A block has users (sequences). A full block whose content was published can be found by what it holds: the chain of
// tokens from the start of the text up to its end. Without users such a block is cached: kept until its place is
// needed, the one not used for longest going first. Not thread safe; holds no keys and values itself.
class BlockPool {
 public:
  // Content of a published block: unique for (content of the block before, its tokens). 0: the empty chain.
  using Content = uint64_t;

  BlockPool(int64_t n_block, int64_t block_size);
  int64_t n_block() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t block_size() const { return block_size_; }
  int64_t n_free() const { return static_cast<int64_t>(free_.size() + lru_.size()); }  // could be allocated now
  int64_t n_cached() const { return static_cast<int64_t>(lru_.size()); }
  int64_t n_used() const { return n_block() - n_free(); }

  std::optional<int32_t> allocate();  // one user; content unknown. Forgets a cached block when nothing else is left
  void retain(int32_t block);         // a user more
  void release(int32_t block);        // a user less
  int64_t users(int32_t block) const { return at(block).users; }
  // Only one user, and nobody can find it: may be written.
  bool exclusive(int32_t block) const { return at(block).users == 1 && at(block).content == 0; }

  // The block holds `tokens` (block_size of them) behind the chain `before`. Returns the content of the chain up to
  // here; when another block already holds the same, this one stays unfindable but counts as equal.
  Content publish(int32_t block, Content before, std::span<const int32_t> tokens);
  // The block that holds `tokens` behind `before`, if any; its tokens are compared, not only their hash.
  struct Found {
    int32_t block;
    Content content;
  };
  std::optional<Found> find(Content before, std::span<const int32_t> tokens) const;

  std::vector<int32_t> cached_blocks() const { return {lru_.begin(), lru_.end()}; }
  void check() const;  // MM_CHECKs that every block is in exactly one state; for tests

 private:
  struct Block {
    int64_t users = 0;
    Content before = 0, content = 0;  // content 0: not findable
    std::vector<int32_t> tokens;      // of a findable block
    uint64_t hash = 0;
    std::list<int32_t>::iterator lru;  // while cached
    bool cached = false;
  };
  const Block& at(int32_t block) const;
  Block& at(int32_t block);
  void forget(int32_t block);

  int64_t block_size_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;
  std::list<int32_t> lru_;  // oldest first
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
  Content next_content_ = 1;
};

}  // namespace mm
