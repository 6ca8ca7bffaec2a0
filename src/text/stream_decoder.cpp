#include "text/stream_decoder.h"

#include "text/unicode.h"

namespace mm {

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string StreamDecoder::push(int32_t id) {
  if (skip_special_ && tokenizer_.is_special(id)) return {};
  pending_ += tokenizer_.token_bytes(id);
  std::string out;
  pending_.erase(0, append_lossy_utf8(pending_, false, out));
  return out;
}

std::string StreamDecoder::flush() {
  std::string out;
  append_lossy_utf8(pending_, true, out);
  pending_.clear();
  return out;
}

}  // namespace mm
