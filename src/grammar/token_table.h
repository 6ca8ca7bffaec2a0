// The tokens of a vocabulary as a tree of bytes, flattened in depth-first order for walking.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grammar/grammar.h"

namespace mm {

struct TokenTable::Impl {
  std::vector<std::string> tokens;  // by id
  // Nodes of the tree but the root, parents before children, children by byte. A subtree is nodes [i, after[i]).
  std::vector<uint8_t> byte;
  std::vector<uint32_t> depth;  // 1: a token's first byte
  std::vector<uint32_t> after;
  std::vector<uint32_t> first_id;  // [nodes + 1]: the tokens that end at node i are ids[first_id[i] .. first_id[i + 1])
  std::vector<int32_t> ids;
  size_t longest = 0;
};

}  // namespace mm
