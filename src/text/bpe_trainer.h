// Byte-level BPE training with the merges (and ties) of HF tokenizers' BpeTrainer.
//
// Memory: counting keeps each distinct pre-token once (its length + 32 bytes), at most max_word_bytes in all, and 32
// MiB of input a time beside it. Merging needs 4 bytes a byte of distinct pre-tokens for their symbols and 4 to 8 for
// each place a pair is noted at (one a byte to begin with, at most two more a merge), so in all less than 32 *
// max_word_bytes, whatever the length of the input. On 35 MB of Chinese and English the peak was 11 times the words' 45
// MiB.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace mm {

struct SpecialToken {
  std::string content;
  bool special = true;  // false: one id, but ordinary text when decoding without special tokens (<think>, <tool_call>)
};

std::vector<SpecialToken> chatml_special_tokens();    // <|endoftext|> <|im_start|> <|im_end|>
std::vector<SpecialToken> minimind_special_tokens();  // MiniMind's 36, in its order

struct BpeTrainerOptions {
  int32_t vocab_size = 6400;  // special tokens and the 256 bytes included
  int64_t min_frequency = 0;
  // The first ids. bos, eos and pad are <|im_start|>, <|im_end|> and <|endoftext|> where these are among them.
  std::vector<SpecialToken> special_tokens = minimind_special_tokens();
  // Beyond this the rarest pre-tokens are dropped (with a warning), and merges may then differ from HF's.
  int64_t max_word_bytes = int64_t{512} << 20;
};

// Feed texts (each an independent training text, as one item of HF's train_from_iterator), then train once. Results do
// not depend on the number of threads. Call from one thread at a time.
class BpeTrainer {
 public:
  explicit BpeTrainer(BpeTrainerOptions options);  // Error if vocab_size cannot hold the special tokens and 256 bytes
  ~BpeTrainer();
  void feed(const std::vector<std::string_view>& texts);  // counted by all cores; views are not kept
  int64_t distinct_words() const;
  int64_t dropped_words() const;  // occurrences dropped to stay within the bound
  // Shows progress. Error if nothing was fed. The chat template is MiniMind's.
  Tokenizer train();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
