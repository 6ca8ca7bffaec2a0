// The greedy loop of BPE training: merge the most frequent pair in all words until the vocabulary is full.
//
// It keeps HF's bookkeeping, on which ties and rare corners depend: an item of the queue is (count when pushed, pair,
// the words where the pair appeared then). The top is the highest count, then the smallest pair of ids. An item whose
// count has changed goes back with the new one. A merge pushes an item for each pair that it formed, with the words
// concerned.
//
// One thread: most merges touch few words, and a barrier each cost more than a team saved (20 s against 4 for 6,100
// merges of 840,000 words, with 4 threads on 4 cores that had other work too).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/bpe.h"

namespace mm {

// Counts by pair, 16 bytes a slot; pairs are never removed.
class PairCounts {
 public:
  int64_t& operator[](uint64_t pair);  // 0 if new; valid until the next call

 private:
  struct Slot {
    uint64_t pair;
    int64_t count;
  };
  std::vector<Slot> slots_;  // open addressing, a power of two
  size_t used_ = 0;
};

class MergeLoop {
 public:
  // tokens: the vocabulary so far (printable alphabet), the 256 bytes among them.
  MergeLoop(const std::array<int32_t, 256>& byte_ids, std::vector<std::string> tokens);
  void add_word(std::string_view bytes, int64_t count);
  void run(int32_t vocab_size, int64_t min_frequency);  // once
  const std::vector<std::string>& tokens() const { return tokens_; }
  std::vector<BpeMerger::Merge> merges() const;  // in rank order; a pair merged twice counts where it came last

 private:
  using Where = std::vector<uint32_t>;  // word indices, ascending, each once
  struct Item {
    int64_t count;
    uint64_t pair;
    uint32_t where;  // index in lists_
    bool operator<(const Item& o) const { return count != o.count ? count < o.count : pair > o.pair; }
  };
  // What a merge of (a, b) into c changed, by the neighbouring symbol x. A left neighbour's pairs (x, a) became (x, c),
  // a right neighbour's (b, x) became (c, x).
  struct Side {
    std::vector<int64_t> changed;  // by x: how many (weighed by the words' counts)
    std::vector<Where> where;      // by x: in which words
    std::vector<int32_t> touched;  // the x concerned
    void fit(size_t symbols);
    void add(int32_t x, int64_t count, uint32_t word);
  };

  void count_pairs();
  void push(uint64_t pair, Where where);
  void merge_words(const Where& words, const BpeMerger::Merge& m);
  void apply(const BpeMerger::Merge& m);

  std::array<int32_t, 256> byte_ids_;
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<BpeMerger::Merge> merges_;

  std::vector<int32_t> symbols_;  // of all words, one after the other; a word shrinks in place
  std::vector<uint64_t> starts_;
  std::vector<uint32_t> lengths_;
  std::vector<int64_t> counts_;

  PairCounts pair_counts_;
  std::vector<Item> queue_;  // a heap
  std::vector<Where> lists_;
  std::vector<uint32_t> free_lists_;
  Side left_, right_;
};

}  // namespace mm
