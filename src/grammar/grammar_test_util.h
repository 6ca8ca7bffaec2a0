// What the tests of this folder share: vocabularies, whole-text matching, and random texts drawn through masks.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/rng.h"
#include "base/test_error.h"
#include "grammar/grammar.h"

namespace mm {

using GrammarPtr = std::shared_ptr<const Grammar>;

inline constexpr int32_t kStop = 0;  // the end token of byte_table() and of MiniMind's tokenizer

// Token 0 is special, token 1 + b is byte b: any text is a sequence of tokens.
inline TokenTable byte_table() {
  std::vector<std::string> tokens(257);
  for (size_t b = 0; b < 256; b++) tokens[b + 1] = std::string(1, static_cast<char>(b));
  return TokenTable(std::move(tokens));
}

// MiniMind's 6,400 tokens; empty if the file is not there. Its vocabulary is written in GPT-2's byte alphabet:
// printable bytes are themselves, the others the characters from U+0100 on, in order.
inline std::vector<std::string> minimind_tokens() {
  const std::string path = std::string(MM_SOURCE_DIR) + "/../shared/models/minimind-tokenizer/tokenizer.json";
  if (!file_exists(path)) return {};
  std::map<std::string, char> byte_of;
  for (int b = 0, others = 0; b < 256; b++) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int code = printable ? b : 256 + others++;
    std::string written;
    if (code < 0x80) written = static_cast<char>(code);
    else written = {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
    byte_of[written] = static_cast<char>(b);
  }
  const json file = parse_large_json(read_file(path), path);
  std::vector<std::string> tokens(file["model"]["vocab"].size());
  for (const auto& [text, id] : file["model"]["vocab"].items()) {
    std::string bytes;
    for (size_t i = 0; i < text.size();) {
      const size_t n = static_cast<uint8_t>(text[i]) < 0x80 ? 1 : 2;
      const auto it = byte_of.find(text.substr(i, n));
      if (it == byte_of.end()) {  // not of the alphabet: a special token
        bytes.clear();
        break;
      }
      bytes += it->second;
      i += n;
    }
    tokens.at(id.get<size_t>()) = bytes;
  }
  for (const auto& token : file["added_tokens"]) tokens.at(token["id"].get<size_t>()).clear();
  return tokens;
}

#define MM_REQUIRE_TOKENIZER(tokens) \
  if ((tokens).empty()) GTEST_SKIP() << "NOT CHECKED with a real vocabulary: ../shared/models is missing"

inline bool feed(GrammarState& state, std::string_view text) {
  for (const char c : text)
    if (!state.accept(1 + static_cast<uint8_t>(c))) return false;
  return true;
}

inline bool matches(const GrammarPtr& grammar, std::string_view text) {
  static const TokenTable table = byte_table();
  GrammarState state(grammar, table);
  return feed(state, text) && state.complete();
}

inline std::vector<uint32_t> mask_of(const GrammarState& state, const TokenTable& table, int32_t stop = kStop) {
  std::vector<uint32_t> bits(static_cast<size_t>((table.size() + 31) / 32), 0xFFFFFFFF);
  state.mask(bits, {&stop, 1});
  return bits;
}

inline bool bit(const std::vector<uint32_t>& bits, int32_t id) {
  return bits[static_cast<size_t>(id / 32)] >> (id % 32) & 1;
}

// A text drawn token by token from what the masks allow. After `hurry` tokens the text ends as soon as it may, and a
// token is drawn that makes progress towards an end: quotes and brackets. "" with a failure if the walk gets stuck.
inline std::string random_text(const GrammarPtr& grammar, const TokenTable& table, Rng& rng, int hurry,
                               int longest = 4000) {
  GrammarState state(grammar, table);
  std::string text;
  for (int step = 0; step < longest; step++) {
    const auto bits = mask_of(state, table);
    std::vector<int32_t> allowed, closing;
    for (int32_t id = 1; id < table.size(); id++) {
      if (!bit(bits, id)) continue;
      allowed.push_back(id);
      if (const auto t = table.bytes(id);
          t.size() == 1 && std::string_view("\"]}\\,:0bcx").find(t[0]) != std::string_view::npos)
        closing.push_back(id);
    }
    const bool may_end = bit(bits, kStop);
    EXPECT_EQ(may_end, state.complete());
    EXPECT_EQ(state.finished(), may_end && allowed.empty());
    if (allowed.empty() || (may_end && (step >= hurry || rng.below(8) == 0))) {
      EXPECT_TRUE(may_end) << "stuck after " << text.substr(0, 300);
      return text;
    }
    const auto& from = step >= hurry && !closing.empty() && rng.below(4) != 0 ? closing : allowed;
    const int32_t id = from[rng.below(from.size())];
    EXPECT_TRUE(state.accept(id)) << text.substr(0, 300) << " + " << table.bytes(id);
    text += table.bytes(id);
  }
  ADD_FAILURE() << "no end after " << longest << " tokens: " << text.substr(0, 300);
  return text;
}

inline GrammarPtr schema_of(const std::string& text) {
  return Grammar::json_schema(parse_json(text, "test"), "schema");
}

}  // namespace mm
