// What the tests of the server share: an engine that does what the test says, a client on a real socket, and the server
// between the two.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "engine/engine.h"
#include "serve/server.h"
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
extern Script* script;  // of the running test; the scripted engine (scripted_engine_test.cpp) follows it

inline EngineEvent piece(std::string text, bool finished = false, FinishReason finish = FinishReason::stop) {
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

inline constexpr const char* kChat = R"({"messages": [{"role": "user", "content": "hi"}]})";
inline constexpr const char* kStream = R"({"messages": [{"role": "user", "content": "hi"}], "stream": true})";
inline constexpr const char* kChatPath = "/v1/chat/completions";

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

}  // namespace mm
