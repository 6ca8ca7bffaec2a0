// The server's connections: clients that leave, stall or are too many, draining and stopping, where it cannot listen.
#include <chrono>
#include <thread>

#include "serve/server.h"
#include "serve/server_test_fixture.h"

namespace mm {
namespace {

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

TEST_F(ServerTest, DrainEndsWhatRunsAndRefusesTheRest) {
  start();
  Client running(server->url()), idle(server->url());
  running.post(kChatPath, kStream);
  const auto give = sink();
  give(piece("begin "));
  running.until("begin");
  std::thread ending([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    Client late(server->url()), later(server->url());
    late.post(kChatPath, kChat);
    const auto a = late.answer();
    EXPECT_EQ(a.status, 503);
    EXPECT_NE(a.head.find("Connection: close"), std::string::npos);
    std::this_thread::sleep_for(std::chrono::milliseconds(400));  // a request that takes a while to arrive
    later.post(kChatPath, kChat);
    EXPECT_EQ(later.answer().status, 503);
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

}  // namespace
}  // namespace mm
