// The server on real sockets, with an engine that does what the test says. The class Engine of this file takes the
// place of the library's at link time.
#include "serve/server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "engine/engine.h"
#include "serve/test_tokenizer.h"

namespace mm {

// What the engine was asked, and how it is to behave.
struct Script {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<EngineRequest> requests;  // id = index + 1
  std::vector<uint64_t> cancelled;
  SubmitStatus status = SubmitStatus::accepted;
  std::string refuse;  // an Error's text
  std::function<void(EngineRequest&)> play = [](EngineRequest&) {};
  bool drained = false;

  template <class F>
  bool wait(F&& f) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(10), f);
  }
};
static Script* script;

struct Engine::Impl {
  EngineOptions options;
};
Engine::Engine(const Model&, std::optional<Tokenizer>, const EngineOptions&, const Model*) : impl_(new Impl) {}
Engine::~Engine() = default;
Submitted Engine::submit(EngineRequest request) {
  Script& s = *script;
  std::unique_lock lock(s.mutex);
  if (!s.refuse.empty()) throw Error(s.refuse);
  if (s.status != SubmitStatus::accepted) return {.status = s.status, .retry_after_seconds = 2.5};
  s.requests.push_back(request);
  const uint64_t id = s.requests.size();
  s.changed.notify_all();
  lock.unlock();
  s.play(request);
  return {.id = id};
}
void Engine::cancel(uint64_t id) {
  const std::lock_guard lock(script->mutex);
  script->cancelled.push_back(id);
  script->changed.notify_all();
}
void Engine::drain(double) {
  const std::lock_guard lock(script->mutex);
  script->drained = true;
  script->status = SubmitStatus::stopping;
}
EngineStats Engine::stats() const { return {}; }
BlockMap Engine::block_map() const {
  return {.n_block = 4, .block_size = 16, .owners = {{7, 0, {2, 3}, 20, true}}, .cached = {1}};
}
int64_t Engine::context() const { return 256; }
std::string Engine::description() const { return "scripted"; }
const EngineOptions& Engine::options() const { return impl_->options; }

namespace {

EngineEvent piece(std::string text, bool finished = false, FinishReason finish = FinishReason::stop) {
  EngineEvent e;
  e.ids = {40};
  e.text = std::move(text);
  e.finished = finished;
  e.finish = finish;
  e.completion_tokens = 1;
  return e;
}

class Client {
 public:
  explicit Client(const std::string& url, int receive_buffer = 0) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(std::stoi(url.substr(url.rfind(':') + 1))));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  ~Client() { close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  bool send(std::string_view text) {
    while (!text.empty()) {
      const ssize_t n = ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      text.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }
  void post(const std::string& path, const std::string& body, const std::string& headers = "") {
    send(fmt::format("POST {} HTTP/1.1\r\nHost: localhost\r\n{}Content-Length: {}\r\n\r\n{}", path, headers,
                     body.size(), body));
  }
  bool more(int milliseconds = 10000) {  // false: closed, or nothing came
    pollfd p{fd_, POLLIN, 0};
    char buffer[16384];
    if (::poll(&p, 1, milliseconds) <= 0) return false;
    const ssize_t n = ::recv(fd_, buffer, sizeof buffer, 0);
    if (n > 0) in.append(buffer, static_cast<size_t>(n));
    closed = n <= 0;
    return n > 0;
  }
  bool until(std::string_view text) {
    while (in.find(text) == std::string::npos)
      if (!more()) return false;
    return true;
  }
  std::string rest() {  // to the end of the connection
    while (more()) {
    }
    EXPECT_TRUE(closed);
    return in;
  }
  struct Answer {
    int status = 0;
    std::string head, body;
  };
  Answer answer() {  // the next one with a Content-Length
    if (!until("\r\n\r\n")) return {0, in, ""};
    const size_t end = in.find("\r\n\r\n") + 4;
    Answer a{std::stoi(in.substr(9, 3)), in.substr(0, end), ""};
    const size_t at = a.head.find("Content-Length: ");
    const size_t n = at == std::string::npos ? 0 : std::stoul(a.head.substr(at + 16));
    while (in.size() < end + n && more()) {
    }
    a.body = in.substr(end, n);
    in.erase(0, end + n);
    return a;
  }
  std::string in;
  bool closed = false;

 private:
  int fd_;
};

const char* const kChat = R"({"messages": [{"role": "user", "content": "hi"}]})";
const char* const kStream = R"({"messages": [{"role": "user", "content": "hi"}], "stream": true})";
const char* const kChatPath = "/v1/chat/completions";

class ServerTest : public testing::Test {
 protected:
  ServerTest() {
    script = &s;
    ModelConfig c;
    c.hidden_size = 8;
    c.intermediate_size = 8;
    c.num_hidden_layers = 1;
    c.num_attention_heads = c.num_key_value_heads = 1;
    c.head_dim = 8;
    c.vocab_size = 16;
    c.max_position_embeddings = 8;
    model = std::make_unique<Model>(c);
    engine = std::make_unique<Engine>(*model, std::nullopt, EngineOptions{});
    options.port = 0;
    options.names = {"tiny"};
    options.threads = 2;
  }
  ~ServerTest() override {
    server.reset();
    s.requests.clear();
  }
  void start() { server = std::make_unique<Server>(*engine, test_tokenizer(), options); }
  void play(std::function<void(EngineRequest&)> f) { s.play = std::move(f); }
  // Waits for request `i` and its sink.
  std::function<void(EngineEvent&&)> sink(size_t i = 0) {
    EXPECT_TRUE(s.wait([&] { return s.requests.size() > i; }));
    return s.requests.at(i).sink;
  }

  Script s;
  ServerOptions options;
  std::unique_ptr<Model> model;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Server> server;
};

TEST_F(ServerTest, AnswersAndKeepsTheConnection) {
  play([](EngineRequest& r) {
    r.sink(piece("Hel"));
    r.sink(piece("lo", true));
  });
  start();
  Client c(server->url());
  for (int i = 0; i < 3; i++) {
    c.post(kChatPath, kChat);
    const auto a = c.answer();
    EXPECT_EQ(a.status, 200) << a.body;
    EXPECT_EQ(ordered_json::parse(a.body)["choices"][0]["message"]["content"], "Hello");
  }
}

TEST_F(ServerTest, StreamsAsItComes) {
  start();
  Client c(server->url());
  c.post(kChatPath, kStream);
  const auto give = sink();
  give(piece("one"));
  EXPECT_TRUE(c.until("\"content\":\"one\""));
  give(piece("two"));
  EXPECT_TRUE(c.until("\"content\":\"two\""));
  EXPECT_EQ(c.in.find("[DONE]"), std::string::npos);
  give(piece("", true, FinishReason::length));
  EXPECT_TRUE(c.until("data: [DONE]\n\n\r\n0\r\n\r\n"));
  EXPECT_NE(c.in.find("\"finish_reason\":\"length\""), std::string::npos);
  EXPECT_NE(c.in.find("Transfer-Encoding: chunked"), std::string::npos);
}

TEST_F(ServerTest, OldClientsGetNoChunks) {
  play([](EngineRequest& r) { r.sink(piece("hi", true)); });
  start();
  Client c(server->url());
  c.send(fmt::format("POST {} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{}", kChatPath, strlen(kStream),
                     kStream));
  const std::string all = c.rest();
  EXPECT_TRUE(all.starts_with("HTTP/1.0 200") && all.ends_with("data: [DONE]\n\n")) << all;
  EXPECT_EQ(all.find("chunked"), std::string::npos);
}

TEST_F(ServerTest, PipelinedRequestsAreAnsweredInOrder) {
  play([n = 0](EngineRequest& r) mutable { r.sink(piece(std::to_string(++n), true)); });
  start();
  Client c(server->url());
  std::string all;
  for (int i = 0; i < 20; i++) {
    all += fmt::format("POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{}", kChatPath, strlen(kChat),
                       kChat);
    all += "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
  }
  c.send(all);
  for (int i = 1; i <= 20; i++) {
    EXPECT_EQ(ordered_json::parse(c.answer().body)["choices"][0]["message"]["content"], std::to_string(i));
    EXPECT_EQ(ordered_json::parse(c.answer().body)["status"], "ok");
  }
}

TEST_F(ServerTest, OverloadAndErrorsHaveTheirStatus) {
  start();
  Client c(server->url());
  s.status = SubmitStatus::queue_full;
  c.post(kChatPath, kChat);
  auto a = c.answer();
  EXPECT_EQ(a.status, 429);
  EXPECT_NE(a.head.find("Retry-After: 3\r\n"), std::string::npos) << a.head;
  EXPECT_EQ(ordered_json::parse(a.body)["error"]["code"], "rate_limit_exceeded");
  s.status = SubmitStatus::stopping;
  c.post(kChatPath, kStream);
  EXPECT_EQ(c.answer().status, 503);
  s.status = SubmitStatus::accepted;
  s.refuse = "stop_strings: expected at most 4, found 5";
  c.post(kChatPath, kChat);
  EXPECT_EQ(c.answer().status, 400);
  s.refuse.clear();
  for (const auto& [finish, status] :
       {std::pair{FinishReason::error, 500}, {FinishReason::timeout, 504}, {FinishReason::cancelled, 503}}) {
    play([f = finish](EngineRequest& r) { r.sink(piece("", true, f)); });
    for (const char* body : {kChat, kStream}) {  // nothing of the stream has gone out: the status still tells
      c.post(kChatPath, body);
      EXPECT_EQ(c.answer().status, status);
    }
  }
  play([](EngineRequest& r) { r.sink(piece("fine", true)); });
  c.post(kChatPath, kChat);
  EXPECT_EQ(c.answer().status, 200);
}

TEST_F(ServerTest, AnErrorInsideAStreamEndsIt) {
  start();
  Client c(server->url());
  c.post(kChatPath, kStream);
  const auto give = sink();
  give(piece("part"));
  ASSERT_TRUE(c.until("part"));
  give(piece("", true, FinishReason::error));
  EXPECT_TRUE(c.until("0\r\n\r\n"));
  EXPECT_NE(c.in.find("data: {\"error\":"), std::string::npos);
}

TEST_F(ServerTest, AWholeAnswerHasABound) {
  play([](EngineRequest& r) {
    for (int i = 0; i < 80; i++) r.sink(piece(std::string(1 << 20, 'x')));
  });
  start();
  Client c(server->url());
  c.post(kChatPath, kChat);
  const auto a = c.answer();
  EXPECT_EQ(a.status, 400);
  EXPECT_EQ(ordered_json::parse(a.body)["error"]["code"], "answer_too_large");
  EXPECT_TRUE(s.wait([&] { return !s.cancelled.empty(); }));
}

TEST_F(ServerTest, WithoutAUserTheAddressIsTheClient) {
  play([](EngineRequest& r) { r.sink(piece("x", true)); });
  start();
  Client c(server->url());
  c.post(kChatPath, kChat);
  c.answer();
  c.post(kChatPath, R"({"messages": [{"role": "user", "content": "hi"}], "user": "me"})");
  c.answer();
  EXPECT_EQ(s.requests[0].client, "127.0.0.1");
  EXPECT_EQ(s.requests[1].client, "me");
}

TEST_F(ServerTest, ALeavingClientCancels) {
  start();
  for (const bool stream : {false, true}) {
    const size_t n = s.requests.size();
    Client c(server->url());
    c.post(kChatPath, stream ? kStream : kChat);
    const auto give = sink(n);
    if (stream) {
      give(piece("x"));
      c.until("x\"");
    }
    c.close();
    EXPECT_TRUE(s.wait([&] { return !s.cancelled.empty() && s.cancelled.back() == n + 1; })) << stream;
    give(piece("", true, FinishReason::cancelled));  // into the void
  }
}

TEST_F(ServerTest, AReaderThatDoesNotReadIsDropped) {
  options.max_pending = 256 << 10;
  start();
  Client c(server->url(), 4096);
  c.post(kChatPath, kStream);
  const auto give = sink();
  const auto cancelled = [&] {
    const std::lock_guard lock(s.mutex);
    return !s.cancelled.empty();
  };
  for (int i = 0; i < 4000 && !cancelled(); i++) {
    give(piece(std::string(1000, 'x')));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  EXPECT_TRUE(s.wait([&] { return !s.cancelled.empty(); }));
}

TEST_F(ServerTest, AReaderThatStopsIsDropped) {
  options.write_seconds = 0.3;
  start();
  Client c(server->url(), 4096);
  c.post(kChatPath, kStream);
  const auto give = sink();
  for (int i = 0; i < 900; i++) give(piece(std::string(1000, 'x')));
  EXPECT_TRUE(s.wait([&] { return !s.cancelled.empty(); }));
}

TEST_F(ServerTest, ASilentStreamSendsComments) {
  options.comment_seconds = 0.3;
  start();
  Client c(server->url());
  c.post(kChatPath, kStream);
  EXPECT_TRUE(c.until(": waiting\n\n"));
  sink()(piece("late", true));
  EXPECT_TRUE(c.until("0\r\n\r\n"));
  EXPECT_NE(c.in.find("late"), std::string::npos);
}

TEST_F(ServerTest, ManyPromptsDoNotFloodTheQueue) {
  start();
  Client c(server->url());
  std::string body = R"({"input": ["a")";
  for (int i = 1; i < 100; i++) body += ",\"a\"";
  c.post("/v1/embeddings", body + "]}");
  for (size_t i = 0; i < 100; i++) {
    const auto give = sink(i);
    EXPECT_LE(s.requests.size(), i + 32);
    EngineEvent e = piece("", true);
    e.embedding = {static_cast<float>(i)};
    give(std::move(e));
  }
  const auto data = ordered_json::parse(c.answer().body)["data"];
  ASSERT_EQ(data.size(), 100u);
  EXPECT_EQ(data[99]["embedding"][0], 99.0);
}

TEST_F(ServerTest, SlowHeadersAndBodies) {
  options.read_seconds = 0.3;
  start();
  Client head(server->url());
  head.send("GET /health HTTP/1.1\r\nHost: loc");
  EXPECT_TRUE(head.rest().starts_with("HTTP/1.1 408"));
  Client body(server->url());
  body.send("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{\"content\"");
  EXPECT_TRUE(body.rest().starts_with("HTTP/1.1 408"));
}

struct Shape {
  const char* request;
  int status;
};

TEST_F(ServerTest, OddRequestsAreRefusedAndTheConnectionEnds) {
  options.max_body = 1000;
  options.read_seconds = 2;
  start();
  const std::string long_header =
      "GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + std::string(20000, 'x') + "\r\n\r\n";
  const std::string endless_chunk =
      "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5;" + std::string(100000, 'x');
  for (const Shape& shape : {
           Shape{"GARBAGE\r\n\r\n", 400},
           Shape{"GET /health HTTP/1.1\r\n\r\n", 400},                                        // no Host
           Shape{"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400},  // two
           Shape{"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505},
           Shape{"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
                 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
                 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\nhello", 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\nhello", 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: "
                 "chunked\r\n\r\n0\r\n\r\n",
                 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: "
                 "5\r\n\r\n0\r\n\r\n",
                 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
                 501},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\n\r\nGET /x "
                 "HTTP/1.1\r\n\r\n",
                 501},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400},
           Shape{
               "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
               400},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n{", 413},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n", 413},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: evil.test\r\nContent-Length: 2\r\n\r\n", 403},
           Shape{long_header.c_str(), 431},
           Shape{endless_chunk.c_str(), 400},
       }) {
    Client c(server->url());
    c.send(shape.request);
    const std::string all = c.rest();
    EXPECT_TRUE(all.starts_with(fmt::format("HTTP/1.1 {} ", shape.status)))
        << std::string(shape.request).substr(0, 200) << "\n"
        << all;
    EXPECT_EQ(all.find("HTTP/1.1", 8), std::string::npos) << "a second answer\n" << all;
    EXPECT_NE(all.find("\"error\":"), std::string::npos) << all;
  }
}

TEST_F(ServerTest, RoutesAndMethods) {
  start();
  Client c(server->url());
  for (const auto& [line, status] : {std::pair{"GET /nothing", 404},
                                     {"GET /v1/nothing", 404},
                                     {"GET /v1/chat/completions", 405},
                                     {"DELETE /v1/models", 405},
                                     {"GET /v1/models", 200},
                                     {"GET /v1/models/tiny", 200},
                                     {"GET /v1/models/t%69ny", 200},
                                     {"GET /v1/models/huge", 404},
                                     {"GET /metrics", 200},
                                     {"GET /debug/blocks", 200},
                                     {"GET /?x=1", 200},
                                     {"GET http://localhost/health", 200}}) {
    c.send(fmt::format("{} HTTP/1.1\r\nHost: localhost\r\n\r\n", line));
    const auto a = c.answer();
    EXPECT_EQ(a.status, status) << line;
    if (status == 405) {
      EXPECT_NE(a.head.find("Allow: "), std::string::npos);
    }
  }
  c.send("GET /debug/blocks HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(ordered_json::parse(c.answer().body)["owners"][0]["blocks"], ordered_json::array({2, 3}));
  c.send(
      "HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nConnection: "
      "close\r\n\r\n");
  const std::string both = c.rest();
  EXPECT_EQ(both.find("{\"status\"", both.find("{\"status\"") + 1), std::string::npos) << both;  // no body for HEAD
}

TEST_F(ServerTest, KeysOriginsAndPreflights) {
  options.api_key = "secret";
  options.cors_origins = {"https://app.test"};
  start();
  Client c(server->url());
  const auto get = [&](const std::string& path, const std::string& headers, const char* method = "GET") {
    c.send(fmt::format("{} {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n", method, path, headers));
    return c.answer();
  };
  EXPECT_EQ(get("/v1/models", "").status, 401);
  EXPECT_EQ(get("/v1/models", "Authorization: Bearer wrong\r\n").status, 401);
  EXPECT_EQ(get("/v1/models", "Authorization: Bearer secret\r\n").status, 200);
  EXPECT_EQ(get("/health", "").status, 200);
  EXPECT_EQ(get("/", "").status, 200);
  EXPECT_EQ(get("/health", "Origin: https://evil.test\r\n").status, 403);
  const auto allowed = get("/v1/models", "Origin: https://app.test\r\nAuthorization: Bearer secret\r\n");
  EXPECT_NE(allowed.head.find("Access-Control-Allow-Origin: https://app.test"), std::string::npos);
  const auto preflight =
      get(kChatPath, "Origin: https://app.test\r\nAccess-Control-Request-Method: POST\r\n", "OPTIONS");
  EXPECT_EQ(preflight.status, 204);
  EXPECT_NE(preflight.head.find("Access-Control-Allow-Headers: Authorization"), std::string::npos);
  EXPECT_EQ(get(kChatPath, "Origin: https://evil.test\r\n", "OPTIONS").status, 403);
}

TEST_F(ServerTest, DrainEndsWhatRunsAndRefusesTheRest) {
  start();
  Client running(server->url()), idle(server->url());
  running.post(kChatPath, kStream);
  const auto give = sink();
  give(piece("begin "));
  running.until("begin");
  std::thread ending([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    Client late(server->url());
    late.post(kChatPath, kChat);
    const auto a = late.answer();
    EXPECT_EQ(a.status, 503);
    EXPECT_NE(a.head.find("Connection: close"), std::string::npos);
    give(piece("end", true));
  });
  server->drain(5);
  ending.join();
  const std::string all = running.rest();
  EXPECT_NE(all.find("\"content\":\"end\""), std::string::npos);
  EXPECT_TRUE(all.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"));
  EXPECT_TRUE(s.drained);
}

TEST_F(ServerTest, TooManyConnectionsAreTurnedAway) {
  options.max_connections = 2;
  start();
  Client a(server->url()), b(server->url());
  a.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  b.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(a.answer().status, 200);
  EXPECT_EQ(b.answer().status, 200);
  Client c(server->url());
  EXPECT_EQ(c.answer().status, 503);
}

TEST_F(ServerTest, StoppingWithOpenRequestsIsSafe) {
  start();
  Client c(server->url());
  c.post(kChatPath, kStream);
  const auto give = sink();
  server.reset();
  give(piece("to nobody"));
  give(piece("", true));
  EXPECT_TRUE(s.wait([&] { return !s.cancelled.empty(); }));
}

TEST_F(ServerTest, WhatCannotBeHadIsAnError) {
  start();
  const auto fails = [&](auto change) {
    ServerOptions o = options;
    change(o);
    EXPECT_THROW(Server(*engine, test_tokenizer(), o), Error);
  };
  fails([&](ServerOptions& o) { o.port = std::stoi(server->url().substr(server->url().rfind(':') + 1)); });
  fails([](ServerOptions& o) { o.host = "0.0.0.0"; });  // without a key
  fails([](ServerOptions& o) { o.host = "no.such.host.invalid"; });
  fails([](ServerOptions& o) { o.tls_cert = "/dev/null"; });
  fails([](ServerOptions& o) { o.tls_cert = o.tls_key = "/dev/null"; });
}

// Throughput of the way from the engine's thread to the sockets; prints a figure, checks that nothing is lost.
TEST_F(ServerTest, ManyStreamsAtOnce) {
  start();
  constexpr size_t n_client = 64, n_token = 200;
  std::vector<std::unique_ptr<Client>> clients;
  for (size_t i = 0; i < n_client; i++) {
    clients.push_back(std::make_unique<Client>(server->url()));
    clients.back()->post(kChatPath, kStream);
    sink(i);
  }
  const auto begin = std::chrono::steady_clock::now();
  std::thread engine_thread([&] {
    for (size_t t = 0; t < n_token; t++)
      for (size_t i = 0; i < n_client; i++) s.requests[i].sink(piece("word ", t + 1 == n_token));
  });
  for (auto& c : clients) {
    EXPECT_TRUE(c->until("0\r\n\r\n"));
    size_t n = 0;
    for (size_t at = 0; (at = c->in.find("\"content\":\"word \"", at)) != std::string::npos; at++) n++;
    EXPECT_EQ(n, n_token);
  }
  engine_thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%.0f events/s\n", static_cast<double>(n_client * n_token) / seconds);
}

}  // namespace
}  // namespace mm
