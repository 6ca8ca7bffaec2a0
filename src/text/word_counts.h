// Counts of distinct words: an append-only hash table that owns the words' bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

inline uint64_t hash_word(std::string_view w) {
  const char* p = w.data();
  size_t n = w.size();
  uint64_t h = 0x9E3779B97F4A7C15ull ^ n;
  const auto mix = [&](uint64_t v) {
    h = (h ^ v) * 0xBF58476D1CE4E5B9ull;
    h ^= h >> 31;
  };
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    mix(v);
  }
  if (n > 0) {
    uint64_t v = 0;
    std::memcpy(&v, p, n);
    mix(v);
  }
  return h ^ h >> 29;
}

// Not thread safe.
class WordCounts {
 public:
  struct Entry {
    uint64_t offset, hash;
    int64_t count;
    uint32_t length;
  };
  void add(std::string_view word, uint64_t hash, int64_t count);
  // Forgets every word with a count of at most `limit`; returns how many occurrences went.
  int64_t drop_rare(int64_t limit);
  const std::vector<Entry>& entries() const { return entries_; }  // in order of first appearance
  std::string_view word(const Entry& e) const { return {bytes_.data() + e.offset, e.length}; }
  int64_t cost() const { return static_cast<int64_t>(bytes_.size() + entries_.size() * 32); }

 private:
  void rebuild(size_t slots);

  std::string bytes_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> slots_;  // index + 1 of an entry, 0 = empty; a power of two, load at most 5/8
};

}  // namespace mm
