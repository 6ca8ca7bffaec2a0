// Byte-pair merging of one word: repeatedly the pair of lowest rank, leftmost first, as HF's BPE model does.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace mm {

// Immutable after construction; const methods may be called from any thread.
class BpeMerger {
 public:
  struct Merge {
    int32_t left, right, result;
  };
  // merges in rank order (of equal pairs the last counts); byte_ids: the token of each single byte.
  BpeMerger(const std::vector<Merge>& merges, const std::array<int32_t, 256>& byte_ids);

  // Appends the ids of one word. O(n log n) time and O(n) memory for a word of n bytes.
  void encode_word(std::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Found {
    int32_t rank, result;
  };
  const Found* find(int32_t left, int32_t right) const;
  int32_t rank_of(int32_t left, int32_t right) const;
  void encode_short(std::string_view word, std::vector<int32_t>& ids) const;
  void encode_long(std::string_view word, std::vector<int32_t>& ids) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<uint64_t> keys_;  // open addressing, load at most a half
  std::vector<Found> found_;
  uint64_t mask_ = 0;
  int shift_ = 0;
};

}  // namespace mm
