// Work that is launched again and again in a few shapes: on a GPU captured as a graph and replayed, elsewhere just run.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "tensor/device.h"

namespace mm {

// A captured graph names addresses and sizes: what `launches` reads and writes must lie at the same place whenever its
// shape is the same. Not thread safe; the session must outlive it.
class GraphCache {
 public:
  GraphCache();
  ~GraphCache();
  GraphCache(GraphCache&&) noexcept;
  // The first time a shape is run as it is (matrix products of new sizes are timed then), the second time captured.
  void run(const Device& dev, std::pair<int64_t, int64_t> shape, const std::function<void()>& launches);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
