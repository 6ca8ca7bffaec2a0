// HF tokenizer.json and tokenizer_config.json <-> plain vocabulary, merges and added tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/bpe.h"

namespace mm {

struct AddedToken {
  std::string content;
  bool special = true;
  bool lstrip = false, rstrip = false;  // swallow white space on that side
  bool normalized = false;              // looked for after all the others
  int32_t id = -1;
};

struct TokenizerSpec {
  std::vector<std::string> tokens;  // by id, as written in the file (printable alphabet); "" for an id without a token
  std::vector<BpeMerger::Merge> merges;
  std::vector<AddedToken> added;
  std::string bos, eos, pad, unk;  // contents; "" if none
  std::string chat_template;
};

// config_json may be empty. Error names file and field for anything malformed and for every feature that would change
// ids and is not supported: normalizers, pre-tokenizers other than ByteLevel, byte fallback, dropout, prefixes, ...
TokenizerSpec parse_tokenizer(std::string_view tokenizer_json, std::string_view config_json, const std::string& where);

std::string write_tokenizer_json(const TokenizerSpec& spec);
std::string write_tokenizer_config(const TokenizerSpec& spec);

}  // namespace mm
