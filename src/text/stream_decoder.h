// Turns ids into text one at a time without ever giving out half a UTF-8 character. All that push and flush return,
// joined, equals decode() of all the ids.
#pragma once

#include <string>

#include "text/tokenizer.h"

namespace mm {

class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special = true);
  std::string push(int32_t id);  // complete characters that became available (may be empty)
  std::string flush();           // what is left; an incomplete character becomes U+FFFD

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace mm
