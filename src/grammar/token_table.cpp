#include "grammar/token_table.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace mm {

TokenTable::TokenTable(std::vector<std::string> token_bytes) {
  auto impl = std::make_shared<Impl>();
  impl->tokens = std::move(token_bytes);
  const std::vector<std::string>& tokens = impl->tokens;
  std::vector<int32_t> order;
  for (size_t id = 0; id < tokens.size(); id++)
    if (!tokens[id].empty()) order.push_back(static_cast<int32_t>(id));
  const auto text = [&](int32_t id) -> const std::string& { return tokens[static_cast<size_t>(id)]; };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int by_bytes = text(a).compare(text(b));
    return by_bytes != 0 ? by_bytes < 0 : a < b;
  });
  std::vector<uint32_t> path;  // the nodes of the last token's bytes
  const auto close = [&](size_t depth) {
    for (; path.size() > depth; path.pop_back()) impl->after[path.back()] = static_cast<uint32_t>(impl->byte.size());
  };
  std::string_view last;
  for (const int32_t id : order) {
    const std::string& bytes = text(id);
    size_t same = 0;
    while (same < bytes.size() && same < last.size() && bytes[same] == last[same]) same++;
    close(same);
    for (size_t i = same; i < bytes.size(); i++) {
      path.push_back(static_cast<uint32_t>(impl->byte.size()));
      impl->byte.push_back(static_cast<uint8_t>(bytes[i]));
      impl->depth.push_back(static_cast<uint32_t>(i + 1));
      impl->after.push_back(0);
      impl->first_id.push_back(static_cast<uint32_t>(impl->ids.size()));
    }
    impl->ids.push_back(id);
    impl->longest = std::max(impl->longest, bytes.size());
    last = bytes;
  }
  close(0);
  impl->first_id.push_back(static_cast<uint32_t>(impl->ids.size()));
  impl_ = std::move(impl);
}

int64_t TokenTable::size() const { return static_cast<int64_t>(impl_->tokens.size()); }

std::string_view TokenTable::bytes(int32_t id) const {
  MM_CHECK(id >= 0 && id < size(), "token {} of {}", id, size());
  return impl_->tokens[static_cast<size_t>(id)];
}

}  // namespace mm
