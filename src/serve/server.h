// The HTTP server: the OpenAI API, the chat page and metrics over one engine.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/sampler.h"
#include "text/tokenizer.h"

namespace mm {

class Engine;

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 8000;                         // 0: a free one
  std::vector<std::string> names;          // of the model, at least one; "*" beside it: any name will do
  std::string version;                     // of the program
  std::string api_key;                     // "": none needed
  bool insecure = false;                   // may listen beyond this machine without a key
  std::vector<std::string> cors_origins;   // of pages elsewhere that may ask; "*": any
  std::vector<std::string> allowed_hosts;  // further names in the Host header when bound to loopback
  std::string tls_cert, tls_key;           // PEM files; both or none
  int threads = 0;                         // for connections; 0: by the machine
  int64_t max_body = int64_t{4} << 20;     // bytes
  int64_t max_connections = 1024;
  int64_t max_pending = int64_t{1} << 20;  // bytes of a stream that its client has not read yet
  double read_seconds = 15;                // for a request's head; four times as long for its body
  double write_seconds = 30;               // without the client reading anything
  double idle_seconds = 75;                // between requests of a connection
  double comment_seconds = 10;             // a stream without output sends a comment so often
  double request_seconds = 600;            // deadline of a request; 0: none
  // Requests that do not say otherwise
  SamplingParams sampling;
  std::vector<int32_t> stop_ids;
  bool keep_empty_think = true;  // see chat_prompt()
};

class Server {
 public:
  // Binds and listens; Error when that cannot be had. The engine must outlive the server.
  Server(Engine& engine, Tokenizer tokenizer, const ServerOptions& options);
  ~Server();                // drops what is still connected
  std::string url() const;  // "http://127.0.0.1:8000"
  // Answers new requests with 503, lets the running ones end for at most so many seconds, and their texts go out.
  void drain(double seconds);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
