#include "text/tokenizer_stats.h"

#include <algorithm>
#include <numeric>

#include "base/progress.h"
#include "text/unicode.h"

namespace mm {

namespace {

struct Script {
  int64_t characters = 0, zh_bytes = 0, en_bytes = 0;
  bool valid = true;
};

bool is_han(uint32_t c) {
  return (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0xF900 && c <= 0xFAFF) ||
         (c >= 0x20000 && c <= 0x323AF);
}

Script script_of(std::string_view text) {
  Script s;
  const char *p = text.data(), *const end = p + text.size();
  while (p < end) {
    const Utf8Char c = utf8_at(p, end);
    if (c.length == 0) {
      s.valid = false;
      s.characters++;
      p += c.bad;
      continue;
    }
    s.characters++;
    if (is_han(c.code)) s.zh_bytes += c.length;
    if ((c.code | 0x20) >= 'a' && (c.code | 0x20) <= 'z') s.en_bytes++;
    p += c.length;
  }
  return s;
}

double ratio(int64_t a, int64_t b) { return b == 0 ? 0.0 : static_cast<double>(a) / static_cast<double>(b); }

}  // namespace

TokenizerStats::TokenizerStats(Tokenizer tokenizer)
    : tokenizer_(std::move(tokenizer)), counts_(static_cast<size_t>(tokenizer_.vocab_size()), 0) {}

void TokenizerStats::add(const std::vector<std::string_view>& texts) {
  const double start = now_seconds();
  const auto encoded = tokenizer_.encode_batch(texts);
  encode_seconds_ += now_seconds() - start;
  for (const auto& ids : encoded) {
    tokens_ += static_cast<int64_t>(ids.size());
    for (const int32_t id : ids) counts_[static_cast<size_t>(id)]++;
  }
  for (const std::string_view text : texts) {
    const Script s = script_of(text);
    bytes_ += static_cast<int64_t>(text.size());
    characters_ += s.characters;
    zh_bytes_ += s.zh_bytes;
    en_bytes_ += s.en_bytes;
  }
}

ordered_json TokenizerStats::vocabulary() const {
  int64_t added = 0, bytes = 0, zh = 0, en = 0;
  std::vector<int32_t> by_length;
  for (int32_t id = 0; id < tokenizer_.vocab_size(); id++) {
    if (tokenizer_.is_added(id)) {
      added++;
      continue;
    }
    const std::string_view token = tokenizer_.token_bytes(id);
    if (token.empty()) continue;
    by_length.push_back(id);
    const Script s = script_of(token);
    if (token.size() == 1) bytes++;
    if (s.zh_bytes > 0) zh++;
    if (s.en_bytes > 0) en++;
  }
  std::stable_sort(by_length.begin(), by_length.end(), [&](int32_t a, int32_t b) {
    return tokenizer_.token_bytes(a).size() > tokenizer_.token_bytes(b).size();
  });
  by_length.resize(std::min<size_t>(by_length.size(), 10));
  ordered_json longest = ordered_json::array();
  for (const int32_t id : by_length) longest.push_back({{"id", id}, {"token", tokenizer_.decode({&id, 1})}});
  return {{"vocab_size", tokenizer_.vocab_size()},
          {"added_tokens", added},
          {"byte_tokens", bytes},
          {"zh_tokens", zh},
          {"en_tokens", en},
          {"longest_tokens", longest}};
}

ordered_json TokenizerStats::usage() const {
  const auto unused = std::count(counts_.begin(), counts_.end(), 0);
  ordered_json list = ordered_json::array();
  for (size_t id = 0; id < counts_.size() && list.size() < 50; id++) {
    if (counts_[id] == 0) list.push_back(id);
  }
  return {
      {"bytes", bytes_},
      {"characters", characters_},
      {"tokens", tokens_},
      {"bytes_per_token", ratio(bytes_, tokens_)},
      {"tokens_per_character", ratio(tokens_, characters_)},
      {"zh_share", ratio(zh_bytes_, bytes_)},
      {"en_share", ratio(en_bytes_, bytes_)},
      {"used_ids", static_cast<int64_t>(counts_.size()) - unused},
      {"unused_ids", unused},
      {"unused", list},
      {"encode_seconds", encode_seconds_},
      {"encode_mib_per_second", encode_seconds_ > 0 ? static_cast<double>(bytes_) / 1048576.0 / encode_seconds_ : 0.0}};
}

}  // namespace mm
