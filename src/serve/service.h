// The server without its sockets: what each route answers.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "engine/engine.h"
#include "serve/access.h"
#include "serve/api_request.h"
#include "serve/http.h"
#include "serve/metrics.h"
#include "serve/server.h"

namespace mm {

// Shared by all threads; constant but for metrics and the flags.
class Service {
 public:
  Service(Engine& engine, Tokenizer tokenizer, const ServerOptions& options);

  // The reply to a request whose head alone is enough to refuse it (or a CORS preflight); called before the body is
  // read.
  std::optional<Reply> refuse(const HttpRequest& request) const;
  Reply get(const HttpRequest& request) const;  // routes without a body
  // Routes with a body: an answer, or a call for the engine. Takes as long as reading and encoding it.
  std::variant<Reply, ApiCall> post(Route route, const std::string& body) const;
  void add_cors(const HttpRequest& request, Reply& reply) const;

  Engine& engine;
  const ServerOptions options;
  const ApiContext context;
  const AccessRules access;
  const std::string fingerprint;
  mutable Metrics metrics;
  std::atomic<bool> draining{false};
  std::atomic<int64_t> n_connection{0};

 private:
  Reply health() const;
  Reply models() const;
  Reply model(std::string_view path) const;
  Reply blocks() const;
  Reply page(const HttpRequest& request) const;
  std::string model_object(const std::string& name) const;

  const int64_t created_;
};

}  // namespace mm
