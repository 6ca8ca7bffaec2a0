// Byte-level BPE training with the merges (and ties) of HF tokenizers' BpeTrainer.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace mm {

struct BpeTrainerOptions {
  int32_t vocab_size = 6400;
  int64_t min_frequency = 0;
  std::vector<std::string> special_tokens{"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  // Memory bound: distinct pre-tokens kept while counting; the rarest are dropped beyond it (logged, counted).
  int64_t max_words = 20'000'000;
};

// Feed texts (each an independent training text, as one item of HF's train_from_iterator), then train.
class BpeTrainer {
 public:
  explicit BpeTrainer(BpeTrainerOptions options);
  ~BpeTrainer();
  void feed(const std::vector<std::string_view>& texts);  // counted by all cores; views are not kept
  Tokenizer train();                                      // shows progress

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
