// Watches a text stream for stop strings.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mm {

// Bytes at the end of `text` that could be the beginning of `pattern`: the longest suffix that is a proper prefix of
// it.
size_t partial_match_at_end(std::string_view text, std::string_view pattern);

// Gives out text as soon as it cannot be part of a stop string any more. The first stop string to be complete wins (the
// longest, if several end there); it and what follows are never given out. How the text is cut into pushes changes
// nothing about the whole that is given out.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);  // Error when one is empty
  std::string push(std::string_view text);               // text that is safe to show; "" forever after a match
  std::string flush();                                   // the stream ended: what was held back
  bool matched() const { return matched_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool matched_ = false;
};

}  // namespace mm
