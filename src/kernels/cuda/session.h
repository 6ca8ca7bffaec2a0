// A GPU as the ops see it: one stream, its scratch memory, and matrix products by cuBLASLt.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gemm.h"

namespace mm::cuda {

// Not thread safe: one issuing thread. Errors name the GPU, the driver or the library that is missing.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Context ctx;
  Gemm& gemm() { return *gemm_; }

 private:
  std::unique_ptr<Gemm> gemm_;
};

// A captured sequence of launches on a session's stream; replayed as one.
class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(Graph&& o) noexcept : exec_(o.exec_) { o.exec_ = nullptr; }
  Graph& operator=(Graph&&) = delete;
  template <class F>
  static Graph capture(Session& session, F&& launches) {
    begin(session);
    try {
      launches();
    } catch (...) {
      abandon(session);
      throw;
    }
    return end(session);
  }
  void launch(Session& session) const;

 private:
  static void begin(Session& session);
  static Graph end(Session& session);
  static void abandon(Session& session) noexcept;
  void* exec_ = nullptr;
};

}  // namespace mm::cuda
