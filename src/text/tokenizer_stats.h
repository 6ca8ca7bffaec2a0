// What a tokenizer holds and how it does on a text.
#pragma once

#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/tokenizer.h"

namespace mm {

class TokenizerStats {
 public:
  explicit TokenizerStats(Tokenizer tokenizer);
  void add(const std::vector<std::string_view>& texts);  // by all cores; call from one thread at a time

  // vocab_size, added_tokens, byte_tokens, zh_tokens (with Chinese characters), en_tokens (ASCII letters),
  // longest_tokens.
  ordered_json vocabulary() const;
  // bytes, characters, tokens, bytes_per_token, tokens_per_character, zh_share and en_share of the bytes (Han
  // characters, ASCII letters), used_ids, unused_ids, unused (the first 50),
  // encode_seconds, encode_mib_per_second (all threads together, the text in memory).
  ordered_json usage() const;

 private:
  Tokenizer tokenizer_;
  std::vector<int64_t> counts_;  // by id
  int64_t bytes_ = 0, characters_ = 0, tokens_ = 0, zh_bytes_ = 0, en_bytes_ = 0;
  double encode_seconds_ = 0;
};

}  // namespace mm
