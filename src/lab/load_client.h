// The machine of a load test: a few threads, each with epoll over its share of the connections.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "lab/load_stats.h"

namespace mm {

struct LoadTarget {
  std::string host, port, base;  // base: what comes before "/v1/..."
  std::string api_key;
  std::string name() const { return host + ":" + port + base; }
};
// "http://127.0.0.1:8000", "http://host:80/v1": plain HTTP. Error naming the flag on anything else.
LoadTarget load_target_from_url(const std::string& url, const std::string& flag);

struct HttpAnswer {
  int status = 0;
  std::string body;
};
// A blocking GET of base + path. Error when no answer comes.
HttpAnswer http_get(const LoadTarget& target, const std::string& path, double timeout_seconds);

// How the client treats a request.
enum class Behaviour : uint8_t {
  normal,
  slow_reader,  // takes 256 bytes each 50 ms through a small window
  dropped,      // closes the connection in the middle of its own request
  cancelled,    // closes it after `cancel_after` events
};

struct OutRequest {
  std::string path = "/v1/chat/completions", body;
  bool stream = true;
  Behaviour behaviour = Behaviour::normal;
  int64_t cancel_after = 0;
  int kind = 0;            // handed through to the record
  int64_t max_tokens = 0;  // likewise
};

struct LoadLevel {
  int64_t clients = 0;    // closed loop: so many connections, each sends its next request when it has its answer
  double rate = 0;        // open loop: Poisson arrivals a second, whatever is still running
  int64_t n_request = 0;  // measured requests; 0: as many as fit into `seconds`
  double seconds = 10;
  int64_t warmup = 0;  // requests before the measured ones
  double timeout = 120;
  bool keep_alive = true;
  int workers = 1;
  int64_t max_connections = 4096;              // open loop; beyond it requests wait (and their latencies run)
  uint64_t seed = 0;                           // of the arrivals
  std::function<OutRequest(uint64_t i)> make;  // any thread
};

// Live counts, for a progress line.
struct LoadCounts {
  std::atomic<int64_t> sent{0}, done{0}, failed{0}, events{0}, active{0};
};

// Runs one level. `tick` is called on the caller's thread ten times a second; when it returns false the run stops and
// what is unfinished is abandoned. Latencies of an open loop count from the arrival, not from the sending: a client
// that is late does not hide a queue.
LoadResult run_load(const LoadTarget& target, const LoadLevel& level,
                    const std::function<bool(const LoadCounts&)>& tick);

}  // namespace mm
