// A tokenizer for this folder's tests: MiniMind's special tokens, the bytes, some words.
#pragma once

#include "text/bpe_trainer.h"

namespace mm {

inline const Tokenizer& test_tokenizer() {
  static const Tokenizer tokenizer = [] {
    BpeTrainerOptions options;
    options.vocab_size = 36 + 256 + 40;
    BpeTrainer trainer(options);
    trainer.feed({"assistant\nuser\nsystem\n", "hello world hello world", "你好你好"});
    return trainer.train();
  }();
  return tokenizer;
}

}  // namespace mm
