#include "engine/ngram_draft.h"

#include <algorithm>

namespace mm {

void propose_ngram(std::span<const int32_t> tokens, int64_t k, std::vector<int32_t>& draft) {
  constexpr int64_t window = 4096;  // looked back at most: the search stays below a few microseconds
  draft.clear();
  const auto size = static_cast<int64_t>(tokens.size());
  const int64_t from = std::max<int64_t>(0, size - window);
  for (int64_t n = 4; n >= 2; n--) {
    if (size < n + 1) continue;
    const auto last = tokens.last(static_cast<size_t>(n));
    for (int64_t at = size - n - 1; at >= from; at--) {
      if (tokens[static_cast<size_t>(at)] != last[0]) continue;
      const auto here = tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(n));
      if (!std::equal(here.begin(), here.end(), last.begin())) continue;
      const auto begin = tokens.begin() + at + n;
      draft.assign(begin, begin + std::min(k, tokens.end() - begin));
      return;
    }
  }
}

}  // namespace mm
