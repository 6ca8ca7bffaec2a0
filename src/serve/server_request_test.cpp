// What the server does with a request before the engine sees one: HTTP that is odd, routes, keys, origins.
#include "serve/server.h"
#include "serve/server_test_fixture.h"

namespace mm {
namespace {

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
           Shape{"GET /health HTTP/1.0\r\nHost: evil.test\r\n\r\n", 403},
           Shape{"GET /health HTTP/1.0\r\nHost:\r\n\r\n", 403},
           Shape{"GET /health HTTP/1.0\r\nOrigin: http://evil.test\r\n\r\n", 403},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n",
                 415},
           Shape{"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: identity\r\nContent-Encoding: "
                 "br\r\nContent-Length: 2\r\n\r\n",
                 415},
           Shape{long_header.c_str(), 431},
           Shape{endless_chunk.c_str(), 400},
       }) {
    Client c(server->url());
    c.send(shape.request);
    const std::string all = c.rest();
    EXPECT_TRUE(all.starts_with("HTTP/1.") && all.substr(8).starts_with(fmt::format(" {} ", shape.status)))
        << std::string(shape.request).substr(0, 200) << "\n"
        << all;
    EXPECT_EQ(all.find("HTTP/1.", 8), std::string::npos) << "a second answer\n" << all;
    EXPECT_NE(all.find("\"error\":"), std::string::npos) << all;
  }
}

TEST_F(ServerTest, OldClientsMayNotNameTheHost) {
  start();
  Client c(server->url());
  c.send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_TRUE(c.rest().starts_with("HTTP/1.0 200 ")) << c.in;
}

TEST_F(ServerTest, BodiesComeAsTheyAre) {
  start();
  Client c(server->url());
  const std::string body = R"({"content": "hi"})";
  c.post("/tokenize", body, "Content-Encoding: Identity\r\n");
  EXPECT_EQ(c.answer().status, 200);
  c.post("/tokenize", body, "Content-Encoding: gzip\r\n");
  const auto a = c.answer();
  EXPECT_EQ(a.status, 415);
  EXPECT_NE(a.head.find("415 Unsupported Media Type"), std::string::npos) << a.head;
  EXPECT_NE(a.head.find("Accept-Encoding: identity\r\n"), std::string::npos) << a.head;
  EXPECT_NE(a.body.find("Content-Encoding: expected identity or none, but got 'gzip'"), std::string::npos) << a.body;
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

TEST_F(ServerTest, WhatTheEngineBoundsIsNamed) {
  play([](EngineRequest& r) {
    EngineEvent e = piece("", true);
    e.embedding = {0.5f, 1.0f};
    r.sink(std::move(e));
  });
  start();
  Client c(server->url());
  for (const auto& [path, body, param, words] : {
           std::tuple{kChatPath, R"({"messages": [{"role": "user", "content": "hi"}], "n": 65})", "n", "<= 64"},
           {"/v1/completions", R"({"prompt": "hi", "n": 65})", "n", "<= 64"},
           {"/v1/embeddings", R"({"input": "hi", "dimensions": 3})", "dimensions", "2 dimensions"},
       }) {
    c.post(path, body);
    const auto a = c.answer();
    EXPECT_EQ(a.status, 400) << a.body;
    const auto error = ordered_json::parse(a.body)["error"];
    EXPECT_EQ(error["param"], param);
    EXPECT_NE(error["message"].get<std::string>().find(words), std::string::npos) << error;
  }
  c.post("/v1/embeddings", R"({"input": "hi", "dimensions": 2})");
  EXPECT_EQ(c.answer().status, 200);
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

}  // namespace
}  // namespace mm
