// Hostile patterns and schemas: a JSON text is a schema, anything else a regular expression. Compiled or an Error; then
// a random walk through the masks, in which every mask bit must agree with accept(), and whose text, if it ends and
// came from a schema, must be JSON.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/rng.h"
#include "grammar/grammar.h"

static const mm::TokenTable& table() {
  static const mm::TokenTable t = [] {
    std::vector<std::string> tokens(1);
    for (int b = 0; b < 256; b++) tokens.emplace_back(1, static_cast<char>(b));
    for (const char* text :
         {"\":", "\", \"", "{\"", "\"}", "]}", "[[", "true", "null", "00", "abc", "\xE4\xB8", "\xAD\"", "\\u", "12"})
      tokens.emplace_back(text);
    return mm::TokenTable(std::move(tokens));
  }();
  return t;
}

static bool walk(const std::shared_ptr<const mm::Grammar>& grammar, mm::Rng rng, std::string& text) {
  mm::GrammarState state(grammar, table());
  const auto size = static_cast<size_t>(table().size());
  std::vector<uint32_t> bits((size + 31) / 32);
  const int32_t stop = 0;
  for (int step = 0; step < 60; step++) {
    state.mask(bits, {&stop, 1});
    const auto allowed = [&](size_t id) { return (bits[id / 32] >> (id % 32) & 1) != 0; };
    if (allowed(0) != state.complete()) std::abort();
    size_t chosen = 0, n = 0;
    for (size_t id = 1; id < size; id++)
      if (allowed(id) && rng.below(++n) == 0) chosen = id;
    if (state.finished() && n > 0) std::abort();
    // A mask may be empty where a grammar is too ambiguous to be followed; else bits and accept() say the same.
    for (int i = 0; i < 8 && n > 0; i++) {
      const size_t id = 1 + rng.below(size - 1);
      mm::GrammarState copy = state;
      if (copy.accept(static_cast<int32_t>(id)) != allowed(id)) std::abort();
    }
    if (state.complete() && (n == 0 || rng.below(6) == 0)) return true;
    if (n == 0) return false;
    if (!state.accept(static_cast<int32_t>(chosen))) std::abort();
    text += table().bytes(static_cast<int32_t>(chosen));
  }
  return false;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  bool is_json = true;
  std::shared_ptr<const mm::Grammar> grammar;
  try {
    mm::ordered_json schema;
    try {
      schema = mm::parse_json(input, "fuzz");
    } catch (const mm::Error&) {
      is_json = false;
    }
    grammar = is_json ? mm::Grammar::json_schema(schema, "schema") : mm::Grammar::regex(input, "regex");
  } catch (const mm::Error&) {
    return 0;
  }
  for (uint64_t stream = 0; stream < 3; stream++) {
    std::string text;
    if (walk(grammar, {size, stream}, text) && is_json && !mm::ordered_json::accept(text)) std::abort();
  }
  return 0;
}
