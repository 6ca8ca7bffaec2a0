// Requests and replies as the rest of the server sees them, and the table of routes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "serve/api_error.h"

namespace mm {

enum class Route {
  chat,
  completions,
  embeddings,
  tokenize,
  detokenize,
  models,
  model,
  health,
  metrics,
  blocks,
  page,
  unknown,
};

struct HttpRequest {
  std::string method, path;         // path without the query
  std::optional<std::string> host;  // HTTP/1.0 may come without
  std::string origin, authorization, if_none_match;
  std::string content_encoding;  // "": none, or identity
  Route route = Route::unknown;
  bool keep_alive = true, chunked_ok = true;  // HTTP/1.0 knows no chunks
};

struct Reply {
  int status = 200;
  std::string type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

Reply error_reply(const ApiError& error);

// By path alone; everything else may be a file of the page.
Route find_route(std::string_view path);
std::string_view route_name(Route route);       // a label of the metrics: never what a client sent
std::string_view allowed_methods(Route route);  // "POST", "GET, HEAD"
std::string percent_decoded(std::string_view text);

// Status line and headers, with the blank line. content_length -1: chunked where `request` allows it, else to the end
// of the connection.
std::string reply_head(const Reply& reply, int64_t content_length, const HttpRequest& request);

}  // namespace mm
