// Speculative decoding without a second model: what followed the last time the text ended like this (Saxena, "Prompt
// Lookup Decoding", 2023).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mm {

// The tokens behind the latest earlier occurrence of the last n tokens, the longest n from 4 down to 2 that occurs; at
// most k, maybe none.
void propose_ngram(std::span<const int32_t> tokens, int64_t k, std::vector<int32_t>& draft);

}  // namespace mm
