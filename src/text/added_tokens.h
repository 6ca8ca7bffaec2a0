// Finds added tokens inside a text: leftmost, of those the longest, as HF's added vocabulary does.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/tokenizer_json.h"

namespace mm {

// Immutable after construction.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  explicit AddedTokenMatcher(const std::vector<AddedToken>& tokens);

  bool empty() const { return tokens_.empty(); }
  // Cuts `text` up: on_text(string_view) for what lies between, on_token(id) for each token, in order.
  template <class OnText, class OnToken>
  void split(std::string_view text, OnText&& on_text, OnToken&& on_token) const {
    size_t begin = 0, search = 0;
    Match m;
    while (find(text, search, m)) {
      search = m.end;
      const AddedToken& t = tokens_[m.token];
      size_t start = m.start, stop = m.end;
      if (t.lstrip) start = std::max(begin, spaces_before(text, start));
      if (t.rstrip) stop = spaces_after(text, stop);
      if (begin < start) on_text(text.substr(begin, start - begin));
      on_token(t.id);
      begin = stop;
    }
    if (begin < text.size()) on_text(text.substr(begin));
  }

 private:
  struct Match {
    size_t start, end, token;
  };
  bool find(std::string_view text, size_t from, Match& match) const;
  static size_t spaces_before(std::string_view text, size_t end);
  static size_t spaces_after(std::string_view text, size_t begin);

  std::vector<AddedToken> tokens_;
  std::array<bool, 256> first_{};                // bytes a token can begin with
  int only_first_ = -1;                          // the one such byte, if there is only one
  std::unordered_map<uint64_t, uint32_t> next_;  // trie: node << 8 | byte -> node
  std::vector<int32_t> token_at_;                // trie node -> index in tokens_ or -1
};

}  // namespace mm
