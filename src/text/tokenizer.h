// Byte-level BPE with added tokens: what HF `tokenizer.json` describes and MiniMind uses.
//
// Each thread that encodes keeps a cache of short words (512 KiB) for the tokenizer that it used last.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

struct TokenizerSpec;

// Immutable and cheap to copy (shared); every const method may be called from any thread.
class Tokenizer {
 public:
  // `path`: a folder with tokenizer.json (and tokenizer_config.json, chat_template.jinja where present), or the
  // tokenizer.json itself.
  static Tokenizer load(const std::string& path);
  static Tokenizer from_json(std::string_view tokenizer_json, std::string_view config_json, const std::string& where);
  static Tokenizer from_spec(const TokenizerSpec& spec);  // what the trainer makes
  // Writes tokenizer.json and tokenizer_config.json (chat template inside) as transformers reads them; what was loaded
  // is written back unchanged.
  void save(const std::string& dir) const;

  // Ids of `text`; added tokens inside the text are recognised; no BOS or EOS is added. Invalid UTF-8 is encoded byte
  // by byte and survives decode(encode(x)) == x.
  std::vector<int32_t> encode(std::string_view text) const;
  void encode_append(std::string_view text, std::vector<int32_t>& ids) const;
  // encode() of every text by the whole thread team (call from one thread at a time).
  std::vector<std::vector<int32_t>> encode_batch(std::span<const std::string_view> texts) const;
  // Bytes of the ids (unknown ids are dropped). skip_special leaves out the added tokens marked special. Invalid UTF-8
  // in the result is replaced by U+FFFD as HF does, unless raw.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false, bool raw = false) const;
  std::string_view token_bytes(int32_t id) const;  // "" for ids out of range; valid while the tokenizer lives

  int32_t vocab_size() const;         // largest id + 1
  int32_t bos_id() const;             // <|im_start|> in MiniMind; -1 if none
  int32_t eos_id() const;             // <|im_end|>
  int32_t pad_id() const;             // <|endoftext|>
  bool is_special(int32_t id) const;  // an added token marked special
  bool is_added(int32_t id) const;    // an added token, special or not
  std::optional<int32_t> token_to_id(std::string_view content) const;
  const std::string& chat_template() const;  // Jinja source from tokenizer_config.json, "" if none
  uint64_t fingerprint() const;              // changes when anything that affects ids or templates changes

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mm
