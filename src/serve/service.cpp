#include "serve/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <iterator>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "serve/json_text.h"
#include "serve/page.h"

namespace mm {

static ApiContext make_context(const Engine& engine, Tokenizer tokenizer, const ServerOptions& options) {
  ApiContext c(std::move(tokenizer));
  c.context = engine.context();
  c.max_choices = std::min(c.max_choices, engine.options().max_sequences);  // they all run at once
  c.names = options.names;
  c.sampling = options.sampling;
  c.stop_ids = options.stop_ids;
  c.keep_empty_think = options.keep_empty_think;
  c.request_seconds = options.request_seconds;
  return c;
}

static std::string make_fingerprint(const Engine& engine, const ApiContext& context, const ServerOptions& options) {
  return fmt::format("fp_{:016x}", hash_bytes(options.names[0] + options.version + engine.description(),
                                              context.tokenizer.fingerprint()));
}

Service::Service(Engine& e, Tokenizer tokenizer, const ServerOptions& o)
    : engine(e),
      options(o),
      context(make_context(e, std::move(tokenizer), o)),
      access{.loopback = is_loopback_name(o.host),
             .allowed_hosts = o.allowed_hosts,
             .origins = o.cors_origins,
             .api_key = o.api_key},
      fingerprint(make_fingerprint(e, context, o)),
      created_(std::time(nullptr)) {}

std::optional<Reply> Service::refuse(const HttpRequest& r) const {
  if (!host_allowed(access, r.host)) {
    return error_reply({403, "forbidden_host", "", "The Host header names another machine; see --allow-host."});
  }
  if (!origin_allowed(access, r.origin, r.host.value_or(""))) {
    return error_reply({403, "forbidden_origin", "", "Pages of this origin may not use this server; see --cors."});
  }
  if (r.method == "OPTIONS") {
    Reply reply{.status = 204};
    reply.headers = {{"Allow", std::string(allowed_methods(r.route)) + ", OPTIONS"}};
    if (!allow_origin(access, r.origin).empty()) {
      reply.headers.emplace_back("Access-Control-Allow-Methods", "GET, POST, OPTIONS");
      // The client libraries send some headers of their own; none of them does anything here.
      reply.headers.emplace_back("Access-Control-Allow-Headers",
                                 "Authorization, Content-Type, X-Request-Id, User-Agent, OpenAI-Organization, "
                                 "OpenAI-Project, X-Stainless-Arch, X-Stainless-Lang, X-Stainless-OS, "
                                 "X-Stainless-Package-Version, X-Stainless-Runtime, X-Stainless-Runtime-Version, "
                                 "X-Stainless-Retry-Count, X-Stainless-Timeout, X-Stainless-Helper-Method");
      reply.headers.emplace_back("Access-Control-Max-Age", "86400");
    }
    return reply;
  }
  if (r.route == Route::unknown || (r.route == Route::page && find_page_file(r.path) == nullptr))
    return error_reply({404, "unknown_url", "", fmt::format("Unknown request URL: {} {}.", r.method, r.path)});
  const bool post = r.route <= Route::detokenize;
  if (post ? r.method != "POST" : r.method != "GET" && r.method != "HEAD") {
    Reply reply =
        error_reply({405, "method_not_allowed", "",
                     fmt::format("Not allowed to {} on {}; use {}.", r.method, r.path, allowed_methods(r.route))});
    reply.headers.emplace_back("Allow", std::string(allowed_methods(r.route)));
    return reply;
  }
  // The page asks for the key itself; a health check has none.
  if (r.route != Route::page && r.route != Route::health && !key_allowed(access, r.authorization)) {
    return error_reply({401, "invalid_api_key", "",
                        r.authorization.empty()
                            ? "You didn't provide an API key; send it as 'Authorization: Bearer KEY'."
                            : "Incorrect API key provided."});
  }
  if (post && !r.content_encoding.empty()) {
    Reply reply = error_reply({415, "unsupported_content_encoding", "",
                               fmt::format("Content-Encoding: expected identity or none, but got '{}'; send the body "
                                           "uncompressed.",
                                           r.content_encoding)});
    reply.headers.emplace_back("Accept-Encoding", "identity");
    return reply;
  }
  if (post && draining) {
    ApiError error(503, "draining", "", "The server is shutting down.");
    error.retry_after = 5;
    return error_reply(error);
  }
  return std::nullopt;
}

void Service::add_cors(const HttpRequest& request, Reply& reply) const {
  const std::string_view origin = allow_origin(access, request.origin);
  if (!origin.empty()) {
    reply.headers.emplace_back("Access-Control-Allow-Origin", std::string(origin));
    reply.headers.emplace_back("Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
  }
  if (!access.origins.empty()) reply.headers.emplace_back("Vary", "Origin");
}

// The answer where something went wrong that is not the client's fault; the other requests go on.
static Reply failed(const std::exception& e) {
  log_error("a request failed: {}", e.what());
  return error_reply({500, "internal_error", "", "The server had an error while processing your request."});
}

Reply Service::get(const HttpRequest& request) const try {
  switch (request.route) {
    case Route::health: return health();
    case Route::models: return models();
    case Route::model: return model(request.path);
    case Route::blocks: return blocks();
    case Route::page: return page(request);
    case Route::metrics: {
      const std::pair<std::string, std::string> info[] = {
          {"version", options.version}, {"model", options.names[0]}, {"engine", engine.description()}};
      return {.type = "text/plain; version=0.0.4; charset=utf-8",
              .body = metrics.text(engine.stats(), info, n_connection)};
    }
    default: break;
  }
  return error_reply({404, "unknown_url", "", "Unknown request URL."});
} catch (const std::exception& e) {
  return failed(e);
}

Reply Service::health() const {
  const EngineStats s = engine.stats();
  return {.status = draining ? 503 : 200,
          .body = fmt::format(R"({{"status":"{}","waiting":{},"running":{}}})", draining ? "draining" : "ok",
                              s.n_waiting, s.n_running)};
}

std::string Service::model_object(const std::string& name) const {
  std::string out = R"({"id":)";
  append_json_string(name, out);
  fmt::format_to(std::back_inserter(out),
                 R"(,"object":"model","created":{},"owned_by":"minimind","max_model_len":{},"engine":)", created_,
                 context.context);
  append_json_string(engine.description(), out);
  return out + "}";
}

Reply Service::models() const {
  std::string out = R"({"object":"list","data":[)";
  bool first = true;
  for (const auto& name : options.names) {
    if (name == "*") continue;
    if (!first) out += ',';
    first = false;
    out += model_object(name);
  }
  return {.body = out + "]}"};
}

Reply Service::model(std::string_view path) const {
  const std::string name = percent_decoded(path.substr(std::string_view("/v1/models/").size()));
  if (name != "*" && std::find(options.names.begin(), options.names.end(), name) != options.names.end())
    return {.body = model_object(name)};
  return error_reply({404, "model_not_found", "model", fmt::format("The model '{}' does not exist.", name)});
}

Reply Service::blocks() const {
  const BlockMap map = engine.block_map();
  const EngineStats s = engine.stats();
  Reply reply;
  auto out = std::back_inserter(reply.body);
  fmt::format_to(out,
                 R"({{"n_block":{},"block_size":{},"waiting":{},"running":{},"prompt_tokens":{},"cached_tokens":{},)"
                 R"("generated_tokens":{},"owners":[)",
                 map.n_block, map.block_size, s.n_waiting, s.n_running, s.prompt_tokens, s.cached_tokens,
                 s.generated_tokens);
  for (size_t i = 0; i < map.owners.size(); i++) {
    const auto& o = map.owners[i];
    fmt::format_to(out, R"({}{{"request":{},"choice":{},"n_tok":{},"running":{},"blocks":[{}]}})", i > 0 ? "," : "",
                   o.request, o.choice, o.n_tok, o.running, fmt::join(o.blocks, ","));
  }
  fmt::format_to(out, R"(],"cached":[{}]}})", fmt::join(map.cached, ","));
  return reply;
}

Reply Service::page(const HttpRequest& request) const {
  const PageFile* file = find_page_file(request.path);
  Reply reply{.type = std::string(file->mime)};
  reply.headers = {{"ETag", std::string(file->etag)},
                   {"Cache-Control", "no-cache"},
                   {"Content-Security-Policy", std::string(kPageSecurityPolicy)},
                   {"Referrer-Policy", "no-referrer"}};
  if (request.if_none_match == file->etag) reply.status = 304;
  else reply.body = file->body;
  return reply;
}

std::variant<Reply, ApiCall> Service::post(Route route, const std::string& body) const {
  try {
    switch (route) {
      case Route::chat: return parse_chat_request(body, context);
      case Route::completions: return parse_completion_request(body, context);
      case Route::embeddings: return parse_embedding_request(body, context);
      case Route::tokenize: return Reply{.body = answer_tokenize(body, context)};
      case Route::detokenize: return Reply{.body = answer_detokenize(body, context)};
      default: break;
    }
    return error_reply({404, "unknown_url", "", "Unknown request URL."});
  } catch (const ApiError& e) {
    return error_reply(e);
  } catch (const Error& e) {
    return error_reply(bad_value(e.what(), ""));
  } catch (const std::exception& e) {
    return failed(e);
  }
}

}  // namespace mm
