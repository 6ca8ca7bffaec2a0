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
  static constexpr size_t kMaxMerges = (size_t{1} << 23) - 1;  // so that rank * 256 + position fits 31 bits
  // merges in rank order (of equal pairs the last counts); byte_ids: the token of each single byte.
  BpeMerger(const std::vector<Merge>& merges, const std::array<int32_t, 256>& byte_ids);

  // Appends the ids of one word. O(n log n) time and O(n) memory for a word of n bytes.
  void encode_word(std::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Slot {
    uint64_t key;
    int32_t rank;
  };
  int32_t rank_of(int32_t left, int32_t right) const;
  void encode_short(std::string_view word, std::vector<int32_t>& ids) const;
  void encode_long(std::string_view word, std::vector<int32_t>& ids) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Slot> slots_;       // pair -> rank; open addressing, load at most a half
  std::vector<int32_t> results_;  // by rank
  uint64_t mask_ = 0;
  int shift_ = 0;
};

}  // namespace mm
