#include "engine/think_splitter.h"

#include "engine/stop_matcher.h"

namespace mm {

void ThinkSplitter::give(std::string_view text, std::vector<Part>& parts) {
  while (skip_newlines_ && text.starts_with('\n')) text.remove_prefix(1);
  if (text.empty()) return;
  skip_newlines_ = false;
  parts.push_back({inside_, std::string(text)});
}

std::vector<ThinkSplitter::Part> ThinkSplitter::push(std::string_view text) {
  std::vector<Part> parts;
  held_ += text;
  for (;;) {
    const std::string_view tag = inside_ ? "</think>" : "<think>";
    const size_t at = held_.find(tag);
    if (at == std::string::npos) break;
    std::string_view before = std::string_view(held_).substr(0, at);
    while (before.ends_with('\n')) before.remove_suffix(1);
    give(before, parts);
    held_.erase(0, at + tag.size());
    inside_ = !inside_;
    skip_newlines_ = true;
  }
  // Newlines wait too: they go when a tag follows.
  size_t keep = partial_match_at_end(held_, inside_ ? "</think>" : "<think>");
  while (keep < held_.size() && held_[held_.size() - keep - 1] == '\n') keep++;
  give(std::string_view(held_).substr(0, held_.size() - keep), parts);
  held_.erase(0, held_.size() - keep);
  return parts;
}

std::vector<ThinkSplitter::Part> ThinkSplitter::flush() {
  std::vector<Part> parts;
  give(held_, parts);
  held_.clear();
  return parts;
}

}  // namespace mm
