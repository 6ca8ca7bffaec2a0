// Hostile tokenizer.json (and, after a byte 0xFF, tokenizer_config.json): read or an Error. What is read encodes any
// text, gives its bytes back unless an added token swallows white space, and survives being written and read again.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "text/stream_decoder.h"
#include "text/tokenizer_json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t cut = all.find('\xFF');
  const std::string_view file = all.substr(0, cut);
  const std::string_view config = cut == std::string_view::npos ? std::string_view() : all.substr(cut + 1);
  try {
    const mm::TokenizerSpec spec = mm::parse_tokenizer(file, config, "fuzz");
    const auto tokenizer = mm::Tokenizer::from_json(file, config, "fuzz");
    const auto ids = tokenizer.encode(all);
    bool exact = true;
    for (const auto& t : spec.added)
      exact = exact && !t.lstrip && !t.rstrip && tokenizer.token_bytes(t.id) == t.content;
    if (exact && tokenizer.decode(ids, false, true) != all) std::abort();
    mm::StreamDecoder stream(tokenizer, false);
    std::string joined;
    for (const int32_t id : ids) joined += stream.push(id);
    joined += stream.flush();
    if (joined != tokenizer.decode(ids)) std::abort();
    if (mm::Tokenizer::from_spec(spec).encode(all) != ids) std::abort();
  } catch (const mm::Error&) {
  }
  return 0;
}
