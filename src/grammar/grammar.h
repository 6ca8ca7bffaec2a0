// Structured output: which tokens may come next so that the text stays a prefix of what a regular expression or a JSON
// schema allows. Works on bytes, so a character may be cut between tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace mm {

// The bytes of every token, sorted for walking; built once a tokenizer and shared. Tokens with "" (special ones,
// unknown ids) are never allowed inside a text.
class TokenTable {
 public:
  explicit TokenTable(std::vector<std::string> token_bytes);
  int64_t size() const;  // n_vocab
  std::string_view bytes(int32_t id) const;
  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

// A compiled language of byte strings. Immutable; any thread.
class Grammar {
 public:
  struct Impl;
  // Anchored at both ends. Error naming `where` and the position of what is not supported (look-around,
  // back-references).
  static std::shared_ptr<const Grammar> regex(std::string_view pattern, const std::string& where = "regex");
  // JSON Schema (the subset in docs/STRUCTURED_OUTPUT.md); null: any JSON object. Fails closed: a keyword that is not
  // enforced is an Error naming its path ("response_format.json_schema.schema.properties.age.not"), never ignored.
  static std::shared_ptr<const Grammar> json_schema(const ordered_json& schema, const std::string& where = "schema");
  static std::shared_ptr<const Grammar> json_object();  // any JSON object
  // `prefix` literal text, then `inner`, then `suffix` (tool calls: "<tool_call>\n" + arguments + "\n</tool_call>").
  static std::shared_ptr<const Grammar> sequence(const std::vector<std::shared_ptr<const Grammar>>& parts);
  static std::shared_ptr<const Grammar> alternatives(const std::vector<std::shared_ptr<const Grammar>>& parts);
  static std::shared_ptr<const Grammar> literal(std::string_view text);

  explicit Grammar(std::unique_ptr<Impl> impl);
  ~Grammar();
  const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// Where one text stands in a grammar. Not thread safe; copy it to look ahead (speculative decoding).
class GrammarState {
 public:
  GrammarState(std::shared_ptr<const Grammar> grammar, TokenTable table);
  GrammarState(const GrammarState&);
  GrammarState& operator=(const GrammarState&);
  GrammarState(GrammarState&&) noexcept;
  ~GrammarState();
  // Bit i of word i / 32: token i may come next. [ceil(n_vocab / 32)] words. Tokens in `stop_ids` are allowed exactly
  // where the text may end, and are not for accept(). When nothing may come but the end, only they are set. No bit at
  // all: the text cannot go on (a vocabulary without the bytes it needs, or a grammar too ambiguous to follow).
  void mask(std::span<uint32_t> bits, std::span<const int32_t> stop_ids) const;
  bool accept(int32_t id);  // false, and unchanged, when the token is not allowed
  bool complete() const;    // the text may end here
  bool finished() const;    // it must end here

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
