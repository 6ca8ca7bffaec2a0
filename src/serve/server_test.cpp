// The server on real sockets, with an engine that does what the test says: answers, streams, their errors and bounds.
#include "serve/server.h"

#include <chrono>
#include <cstring>
#include <thread>

#include "serve/server_test_fixture.h"

namespace mm {
namespace {

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

TEST_F(ServerTest, NoTokensAreAnsweredWithoutTheEngine) {
  start();
  Client c(server->url());
  std::string prompts = R"(["one", "two")";
  for (int i = 2; i < 100; i++) prompts += R"(, "more")";
  const std::string fields = R"({"max_tokens": 0, "echo": true, "prompt": )" + prompts + "]";
  c.post("/v1/completions", fields + R"(, "n": 2})");
  const auto whole = ordered_json::parse(c.answer().body);
  ASSERT_EQ(whole["choices"].size(), 200u) << whole;
  EXPECT_EQ(whole["choices"][1]["text"], "one");
  EXPECT_EQ(whole["choices"][2]["text"], "two");
  EXPECT_EQ(whole["choices"][199]["finish_reason"], "length");
  EXPECT_GE(whole["usage"]["prompt_tokens"], 200);  // each prompt once, with its BOS
  EXPECT_EQ(whole["usage"]["completion_tokens"], 0);
  c.post("/v1/completions", R"({"max_tokens": 0, "prompt": "one"})");
  EXPECT_EQ(ordered_json::parse(c.answer().body)["choices"][0]["text"], "");
  c.post("/v1/completions", fields + R"(, "stream": true})");
  EXPECT_TRUE(c.until("data: [DONE]\n\n\r\n0\r\n\r\n"));
  EXPECT_NE(c.in.find("\"text\":\"two\",\"logprobs\":null,\"finish_reason\":\"length\""), std::string::npos) << c.in;
  EXPECT_TRUE(s.requests.empty());
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
