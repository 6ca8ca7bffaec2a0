#include "serve/http.h"

#include <fmt/format.h>

#include <charconv>
#include <ctime>
#include <iterator>

namespace mm {

Reply error_reply(const ApiError& error) {
  Reply reply{.status = error.status, .body = error.body()};
  if (error.retry_after > 0) reply.headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  if (error.status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

static constexpr std::string_view kModels = "/v1/models/";

Route find_route(std::string_view path) {
  static constexpr std::pair<std::string_view, Route> table[] = {
      {"/v1/chat/completions", Route::chat},
      {"/v1/completions", Route::completions},
      {"/v1/embeddings", Route::embeddings},
      {"/v1/models", Route::models},
      {"/tokenize", Route::tokenize},
      {"/detokenize", Route::detokenize},
      {"/health", Route::health},
      {"/metrics", Route::metrics},
      {"/debug/blocks", Route::blocks},
  };
  for (const auto& [known, route] : table)
    if (path == known) return route;
  if (path.starts_with(kModels) && path.size() > kModels.size()) return Route::model;
  return path.starts_with("/v1/") ? Route::unknown : Route::page;
}

std::string_view route_name(Route route) {
  switch (route) {
    case Route::chat: return "/v1/chat/completions";
    case Route::completions: return "/v1/completions";
    case Route::embeddings: return "/v1/embeddings";
    case Route::tokenize: return "/tokenize";
    case Route::detokenize: return "/detokenize";
    case Route::models: return "/v1/models";
    case Route::model: return "/v1/models/{id}";
    case Route::health: return "/health";
    case Route::metrics: return "/metrics";
    case Route::blocks: return "/debug/blocks";
    case Route::page: return "page";
    case Route::unknown: break;
  }
  return "other";
}

std::string_view allowed_methods(Route route) { return route <= Route::detokenize ? "POST" : "GET, HEAD"; }

std::string percent_decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    unsigned value = 0;
    const char* begin = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(begin, begin + 2, value, 16).ptr == begin + 2) {
      out += static_cast<char>(value);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

static std::string_view reason(int status) {
  switch (status) {
    case 200: return "OK";
    case 204: return "No Content";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Payload Too Large";
    case 415: return "Unsupported Media Type";
    case 417: return "Expectation Failed";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    default: return "Unknown";
  }
}

static void append_date(std::string& out) {
  const std::time_t now = std::time(nullptr);
  std::tm tm{};
  gmtime_r(&now, &tm);
  char text[64];
  out.append(text, std::strftime(text, sizeof text, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &tm));
}

std::string reply_head(const Reply& reply, int64_t content_length, const HttpRequest& request) {
  std::string out = fmt::format("HTTP/1.{} {} {}\r\nServer: minimind\r\n", request.chunked_ok ? 1 : 0, reply.status,
                                reason(reply.status));
  append_date(out);
  if (reply.status != 204 && reply.status != 304) {
    fmt::format_to(std::back_inserter(out), "Content-Type: {}\r\nX-Content-Type-Options: nosniff\r\n", reply.type);
    if (content_length >= 0) fmt::format_to(std::back_inserter(out), "Content-Length: {}\r\n", content_length);
    else if (request.chunked_ok) out += "Transfer-Encoding: chunked\r\n";
  }
  for (const auto& [name, value] : reply.headers) fmt::format_to(std::back_inserter(out), "{}: {}\r\n", name, value);
  out += request.keep_alive ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  return out;
}

}  // namespace mm
