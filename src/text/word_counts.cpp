#include "text/word_counts.h"

#include "base/error.h"

namespace mm {

void WordCounts::rebuild(size_t slots) {
  slots_.assign(slots, 0);
  const size_t mask = slots - 1;
  for (size_t i = 0; i < entries_.size(); i++) {
    size_t s = entries_[i].hash & mask;
    while (slots_[s] != 0) s = (s + 1) & mask;
    slots_[s] = static_cast<uint32_t>(i + 1);
  }
}

void WordCounts::add(std::string_view w, uint64_t hash, int64_t count) {
  if ((entries_.size() + 1) * 8 > slots_.size() * 5) rebuild(slots_.empty() ? 1024 : slots_.size() * 2);
  const size_t mask = slots_.size() - 1;
  size_t s = hash & mask;
  for (; slots_[s] != 0; s = (s + 1) & mask) {
    Entry& e = entries_[slots_[s] - 1];
    if (e.hash == hash && word(e) == w) {
      e.count += count;
      return;
    }
  }
  MM_CHECK(w.size() < UINT32_MAX && entries_.size() + 1 < UINT32_MAX);
  entries_.push_back({bytes_.size(), hash, count, static_cast<uint32_t>(w.size())});
  bytes_ += w;
  slots_[s] = static_cast<uint32_t>(entries_.size());
}

int64_t WordCounts::drop_rare(int64_t limit) {
  int64_t dropped = 0;
  std::string bytes;
  std::vector<Entry> kept;
  for (Entry e : entries_) {
    if (e.count <= limit) {
      dropped += e.count;
      continue;
    }
    const std::string_view w = word(e);
    e.offset = bytes.size();
    bytes += w;
    kept.push_back(e);
  }
  bytes_ = std::move(bytes);
  entries_ = std::move(kept);
  rebuild(slots_.size());
  return dropped;
}

}  // namespace mm
