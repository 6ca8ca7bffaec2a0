// The load generator against a server that does exactly what a test tells it to.
#include "lab/bench_serve.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/progress.h"
#include "base/rng.h"
#include "lab/http_reader.h"

namespace mm {
namespace {

TEST(LoadStats, PercentilesInterpolate) {
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 50), 2.5);  // numpy.percentile([1, 2, 3, 4], 50)
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 90), 3.7);
  EXPECT_DOUBLE_EQ(percentile({1, 2, 3, 4}, 100), 4);
  EXPECT_DOUBLE_EQ(percentile({7}, 99), 7);
  EXPECT_TRUE(std::isnan(percentile({}, 50)));
  const Summary s = summarize({3, NAN, 1, 2});
  EXPECT_EQ(s.n, 3);
  EXPECT_DOUBLE_EQ(s.mean, 2);
  EXPECT_DOUBLE_EQ(s.max, 3);
}

TEST(LoadStats, GoodputCountsWhatKeepsEveryLimit) {
  const Slo slo = slo_from_text("ttft:500,tpot:50");
  EXPECT_DOUBLE_EQ(slo.ttft, 0.5);
  EXPECT_DOUBLE_EQ(slo.tpot, 0.05);
  EXPECT_TRUE(std::isinf(slo.e2e));
  RequestRecord good{.due = 10, .sent = 10.2, .first = 10.4, .last = 11.2, .end = 11.3, .n_event = 5, .usage = 21};
  EXPECT_NEAR(good.tpot(), 0.04, 1e-12);  // 0.8 s for 20 tokens, by usage: an event may hold several
  EXPECT_TRUE(slo.met_by(good));
  RequestRecord late = good, slow = good, broken = good, single = good;
  late.due = 9.8;   // the limit counts from when it was due, not from when it was sent
  slow.usage = -1;  // 5 events, 0.2 s each
  broken.failure = Failure::cut;
  single.usage = single.n_event = 1;
  EXPECT_FALSE(slo.met_by(late));
  EXPECT_FALSE(slo.met_by(slow));
  EXPECT_FALSE(slo.met_by(broken));
  EXPECT_TRUE(slo.met_by(single));
  LoadResult r{.requests = {good, late, slow, broken}, .window_seconds = 2, .window_tokens = 100};
  r.requests.push_back({.failure = Failure::http});
  r.requests.back().status = 429;
  const ordered_json j = summarize_load(r, slo);
  EXPECT_EQ(j["requests"], 5);
  EXPECT_EQ(j["ok"], 3);
  EXPECT_EQ(j["errors"], (ordered_json{{"cut", 1}, {"http_429", 1}}));
  EXPECT_DOUBLE_EQ(j["output_tokens_per_second"].get<double>(), 50);
  EXPECT_DOUBLE_EQ(j["goodput"]["requests_per_second"].get<double>(), 0.5);
  EXPECT_DOUBLE_EQ(j["goodput"]["share"].get<double>(), 0.2);
  EXPECT_DOUBLE_EQ(j["ttft_ms"]["max"].get<double>(), 600);
  EXPECT_THROW(slo_from_text("ttft:abc"), Error);
  EXPECT_THROW(slo_from_text("itl:3"), Error);
  EXPECT_THROW(slo_from_text("ttft:5ms"), Error);
}

TEST(LoadPlan, LengthsFollowTheirDistribution) {
  const auto moments = [](const std::string& text) {
    const LengthDistribution d = length_distribution_from_text(text, "--x");
    double sum = 0, squares = 0, low = INFINITY, high = 0;
    constexpr int n = 20000;
    for (uint64_t i = 0; i < n; i++) {
      const auto x = static_cast<double>(d.draw(1, 2, i, 100000));
      sum += x, squares += x * x, low = std::min(low, x), high = std::max(high, x);
    }
    return std::array<double, 4>{sum / n, std::sqrt(squares / n - sum / n * (sum / n)), low, high};
  };
  EXPECT_EQ(moments("128"), (std::array<double, 4>{128, 0, 128, 128}));
  EXPECT_EQ(moments("fixed:5")[0], 5);
  const auto uniform = moments("uniform:10:19");
  EXPECT_NEAR(uniform[0], 14.5, 0.1);
  EXPECT_EQ(uniform[2], 10);
  EXPECT_EQ(uniform[3], 19);
  const auto normal = moments("normal:500:50");
  EXPECT_NEAR(normal[0], 500, 2);
  EXPECT_NEAR(normal[1], 50, 1.5);
  const auto lognormal = moments("lognormal:100:0.5");
  EXPECT_NEAR(lognormal[0], 100 * std::exp(0.125), 2);
  EXPECT_GE(moments("normal:5:50")[2], 1);
  for (const char* bad : {"", "0", "-3", "abc", "uniform:5", "uniform:9:5", "normal:a:b", "128x", "uniform:1:2:3"})
    EXPECT_THROW(length_distribution_from_text(bad, "--x"), Error) << bad;
}

TEST(LoadPlan, ArrivalsArePoisson) {
  const std::vector<double> at = poisson_arrivals(50, 20000, 3);
  EXPECT_EQ(at[0], 0);
  double gap_squares = 0;
  for (size_t i = 1; i < at.size(); i++) {
    ASSERT_GE(at[i], at[i - 1]);
    gap_squares += (at[i] - at[i - 1]) * (at[i] - at[i - 1]);
  }
  const double mean = at.back() / 19999;
  EXPECT_NEAR(mean, 0.02, 0.0005);
  EXPECT_NEAR(gap_squares / 19999 / (mean * mean), 2, 0.1);  // exponential gaps: E[x^2] = 2 E[x]^2
  EXPECT_EQ(poisson_arrivals(50, 10, 3)[9], at[9]);
  EXPECT_NE(poisson_arrivals(50, 10, 4)[9], at[9]);
}

TEST(LoadPlan, RequestsDependOnSeedAndNumberAlone) {
  LoadPlan plan{.model = "m",
                .prompt_tokens = length_distribution_from_text("6", ""),
                .output_tokens = length_distribution_from_text("9", ""),
                .shared_tokens = 4,
                .seed = 5,
                .extra = {{"top_p", 0.5}}};
  const ordered_json a = plan.request(1), b = plan.request(2);
  EXPECT_EQ(a, plan.request(1));
  const auto text = a["messages"][0]["content"].get<std::string>(),
             other = b["messages"][0]["content"].get<std::string>();
  EXPECT_EQ(std::count(text.begin(), text.end(), ' '), 5);
  EXPECT_NE(text, other);
  size_t fourth = 0;
  for (int i = 0; i < 4; i++) fourth = text.find(' ', fourth + 1);
  EXPECT_EQ(text.substr(0, fourth), other.substr(0, fourth));
  EXPECT_EQ(a["max_tokens"], 9);
  EXPECT_EQ(a["top_p"], 0.5);
  EXPECT_EQ(a["ignore_eos"], true);
  EXPECT_EQ(a["stream_options"]["include_usage"], true);
  plan.chat = plan.stream = plan.ignore_eos = false;
  const ordered_json c = plan.request(1);
  EXPECT_EQ(c["prompt"], text);
  EXPECT_FALSE(c.contains("messages") || c.contains("ignore_eos") || c.contains("stream_options"));
}

TEST(LoadPlan, PromptsOfAllFormsEachOnceARound) {
  const std::string path = testing::TempDir() + "/load_prompts.jsonl";
  std::ofstream(path)
      << R"({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]})"
      << "\n"
      << R"({"prompt": "b"})"
      << "\n"
      << R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]})"
      << "\n";
  LoadPlan plan{.prompts = load_prompts(path), .seed = 11};
  std::map<std::string, int> seen;
  for (uint64_t i = 0; i < 6; i++) seen[plan.request(i)["messages"].back()["content"].get<std::string>()]++;
  EXPECT_EQ(seen, (std::map<std::string, int>{{"a", 2}, {"b", 2}, {"c", 2}}));
  std::ofstream(path) << "{\"prompt\": \"b\"}\n{\"text\": \"b\"}\n";
  try {
    load_prompts(path);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(":2"), std::string::npos) << e.what();
  }
}

constexpr const char* kAnswer =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    "f\r\ndata: {\"a\":1}\r\n\r\n2\r\n\r\n\r\n20\r\n: comment\ndata: two\ndata: "
    "lines\n\r\n6\r\n\ndata:\r\n6\r\n[DONE]\r\n"
    "2;x=y\r\n\n\n\r\n0\r\nTrailer: t\r\n\r\n";

TEST(HttpReader, SameEventsWhateverTheCuts) {
  const std::string answer = kAnswer;
  const std::vector<std::string> expected{"{\"a\":1}", "two\nlines", "[DONE]"};
  Rng rng{9, 0, 0};
  for (int round = 0; round < 2000; round++) {
    HttpReader http;
    SseReader sse;
    std::vector<std::string> events;
    for (size_t at = 0; at < answer.size();) {
      const size_t n = round == 0 ? 1 : std::min<size_t>(1 + rng.below(round % 2 ? 200 : 7), answer.size() - at);
      std::string body;
      http.feed(std::string_view(answer).substr(at, n), body);
      sse.feed(body, [&](std::string_view data) { events.emplace_back(data); });
      at += n;
      ASSERT_EQ(http.state() == HttpReader::State::done, at == answer.size()) << at;
    }
    ASSERT_EQ(events, expected);
    ASSERT_EQ(http.status(), 200);
    ASSERT_TRUE(http.event_stream() && http.keep_alive());
  }
}

TEST(HttpReader, LengthsCloseAndNonsense) {
  const auto read = [](const std::string& text, bool close = false) {
    HttpReader http;
    std::string body;
    http.feed(text, body);
    if (close) http.closed();
    return std::pair{http.state(), body};
  };
  using State = HttpReader::State;
  EXPECT_EQ(read("HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\nno"), std::pair(State::done, std::string("no")));
  EXPECT_EQ(read("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nno", true).first, State::body);  // cut short
  EXPECT_EQ(read("HTTP/1.0 200 OK\r\n\r\nall", true), std::pair(State::done, std::string("all")));
  EXPECT_EQ(read("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n").first, State::done);
  EXPECT_EQ(read("SSH-2.0-OpenSSH\r\n\r\n").first, State::bad);
  EXPECT_EQ(read("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab").first, State::bad);
  EXPECT_EQ(read("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").first, State::bad);
}

TEST(ReadAnswer, FindsWhatCounts) {
  const auto facts = [](const std::string& text) {
    AnswerFacts f;
    EXPECT_TRUE(read_answer(text, f)) << text;
    return f;
  };
  EXPECT_TRUE(facts(R"({"choices":[{"index":0,"delta":{"content":"x"}}]})").has_text);
  EXPECT_TRUE(facts(R"({"choices":[{"delta":{"reasoning_content":"\"}"}}]})").has_text);
  EXPECT_TRUE(facts(R"({"choices":[{"delta":{"tool_calls":[{"id":"a"}]}}]})").has_text);
  EXPECT_TRUE(facts(R"({"choices":[{"text":" a"}]})").has_text);
  EXPECT_TRUE(facts(R"( {"choices": [ {"message" : {"content" : "a"} } ] } )").has_text);
  for (const char* none : {R"({"choices":[{"delta":{"role":"assistant","content":""}}]})", R"({"content":"x"})",
                           R"({"choices":[{"delta":{"content":null}}]})", R"({"choices":[]})",
                           R"({"choices":[{"logprobs":{"content":"x"}}]})"})
    EXPECT_FALSE(facts(none).has_text) << none;
  const AnswerFacts end =
      facts(R"({"choices":[{"delta":{},"finish_reason":"length"}],"usage":{"prompt_tokens":12,"completion_tokens":34,)"
            R"("prompt_tokens_details":{"cached_tokens":8}}})");
  EXPECT_TRUE(end.has_finish && end.by_length && !end.error);
  EXPECT_EQ(end.prompt_tokens, 12);
  EXPECT_EQ(end.completion_tokens, 34);
  EXPECT_EQ(end.cached_tokens, 8);
  EXPECT_FALSE(facts(R"({"choices":[{"finish_reason":null}],"error":null,"usage":null})").has_finish);
  EXPECT_TRUE(facts(R"({"error":{"message":"no"}})").error);
  AnswerFacts f;
  for (const char* bad : {"", "{", "{\"a\":}", "[1,]", "{\"a\":1}x", "{'a':1}", "\"\n\"", "nul", "{\"a\" 1}", "--"})
    EXPECT_FALSE(read_answer(bad, f)) << bad;
  EXPECT_FALSE(read_answer(std::string(100000, '['), f));
}

// One thread a connection; `script` answers a request (number, socket) and says whether the connection stays.
class ScriptedServer {
 public:
  using Script = std::function<bool(int number, int fd, const std::string& request)>;
  explicit ScriptedServer(Script script) : script_(std::move(script)) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in a{.sin_family = AF_INET, .sin_port = 0, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    MM_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0 && listen(listener_, 512) == 0);
    socklen_t size = sizeof a;
    getsockname(listener_, reinterpret_cast<sockaddr*>(&a), &size);
    target = load_target_from_url(fmt::format("http://127.0.0.1:{}/v1", ntohs(a.sin_port)), "--url");
    acceptor_ = std::jthread([this] {
      for (;;) {
        const int fd = accept(listener_, nullptr, nullptr);
        if (fd < 0) return;
        n_connection++;
        const std::lock_guard lock(mutex_);
        fds_.push_back(fd);
        threads_.emplace_back([this, fd] { serve(fd); });
      }
    });
  }
  ~ScriptedServer() {
    shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (const int fd : fds_) shutdown(fd, SHUT_RDWR);
    threads_.clear();
    for (const int fd : fds_) ::close(fd);
    ::close(listener_);
  }
  static void put(int fd, const std::string& s) {
    [[maybe_unused]] const ssize_t n = send(fd, s.data(), s.size(), MSG_NOSIGNAL);
  }
  static void put_json(int fd, int status, const std::string& body) {
    put(fd, fmt::format("HTTP/1.1 {} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}", status,
                        body.size(), body));
  }
  static void begin_stream(int fd) {
    put(fd, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
  }
  static void put_chunk(int fd, const std::string& s) { put(fd, fmt::format("{:x}\r\n{}\r\n", s.size(), s)); }
  static void put_text(int fd, const std::string& text) {
    put_chunk(fd, "data: {\"choices\":[{\"delta\":{\"content\":\"" + text + "\"}}]}\n\n");
  }
  static void end_stream(int fd, int64_t prompt, int64_t output) {
    put_chunk(fd, fmt::format("data: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"length\"}}],\"usage\":"
                              "{{\"prompt_tokens\":{},\"completion_tokens\":{}}}}}\n\ndata: [DONE]\n\n",
                              prompt, output));
    put(fd, "0\r\n\r\n");
  }

  LoadTarget target;
  std::atomic<int> n_connection{0}, n_request{0};

 private:
  void serve(int fd) {
    const int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    std::string in;
    for (std::vector<char> buffer(65536);;) {
      size_t head = 0;
      while ((head = in.find("\r\n\r\n")) == std::string::npos || in.size() < head + 4 + length(in)) {
        const ssize_t n = recv(fd, buffer.data(), buffer.size(), 0);
        if (n <= 0) return;
        in.append(buffer.data(), static_cast<size_t>(n));
      }
      const size_t whole = head + 4 + length(in);
      if (!script_(n_request++, fd, in.substr(0, whole))) {
        shutdown(fd, SHUT_RDWR);
        return;
      }
      in.erase(0, whole);
    }
  }
  static size_t length(const std::string& in) {
    const size_t at = in.find("Content-Length: ");
    return at == std::string::npos ? 0 : std::stoul(in.substr(at + 16));
  }

  Script script_;
  int listener_ = -1;
  std::mutex mutex_;
  std::vector<int> fds_;
  std::vector<std::jthread> threads_;
  std::jthread acceptor_;
};

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

LoadLevel level_of(int64_t clients, int64_t n) {
  return {.clients = clients, .n_request = n, .timeout = 10, .make = [](uint64_t) {
            return OutRequest{.body = "{\"messages\":[]}", .max_tokens = 4};
          }};
}
bool go_on(const LoadCounts&) { return true; }

TEST(RunLoad, TimesTokensAndKeepsConnections) {
  ScriptedServer server([](int, int fd, const std::string& request) {
    EXPECT_NE(request.find("POST /v1/chat/completions HTTP/1.1\r\n"), std::string::npos);
    EXPECT_NE(request.find("Authorization: Bearer secret\r\n"), std::string::npos);
    ScriptedServer::begin_stream(fd);
    ScriptedServer::put_chunk(fd, "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n");
    sleep_ms(60);  // the first token
    ScriptedServer::put_text(fd, "a");
    for (int i = 0; i < 3; i++) sleep_ms(20), ScriptedServer::put_text(fd, "b");
    ScriptedServer::end_stream(fd, 7, 4);
    return true;
  });
  server.target.api_key = "secret";
  LoadLevel level = level_of(3, 12);
  level.warmup = 3;
  level.workers = 2;
  const LoadResult r = run_load(server.target, level, go_on);
  ASSERT_EQ(r.requests.size(), 12u);
  EXPECT_EQ(server.n_request, 15);
  EXPECT_EQ(server.n_connection, 3);
  for (const RequestRecord& q : r.requests) {
    EXPECT_EQ(q.failure, Failure::none);
    EXPECT_EQ(q.usage, 4);
    EXPECT_EQ(q.prompt_tokens, 7);
    EXPECT_EQ(q.n_event, 4);
    EXPECT_TRUE(q.by_length && q.done_mark);
    EXPECT_GE(q.ttft(), 0.060);
    // Not tpot >= 20 ms: a reader that was late with the first token measures less. The answer's end cannot be early.
    EXPECT_GE(q.e2e(), 0.120);
    EXPECT_NEAR(q.ttft() + 3 * q.tpot(), q.last - q.due, 1e-9);
  }
  const ordered_json j = summarize_load(r, {});
  EXPECT_GT(j["tpot_ms"]["mean"].get<double>(), 17);
  EXPECT_LT(j["ttft_ms"]["p50"].get<double>(), 150);  // 60 where the machine is not busy
  EXPECT_LT(j["tpot_ms"]["p50"].get<double>(), 60);
  EXPECT_NEAR(j["itl_ms"]["mean"].get<double>(), j["tpot_ms"]["mean"].get<double>(), 1);
  EXPECT_EQ(j["tokens_from"], "usage");
  // The warm-up's last tokens may fall into the window; all 48 of the measured requests do.
  EXPECT_GE(r.window_tokens, 48);
  EXPECT_LE(r.window_tokens, 60);
}

TEST(RunLoad, EveryKindOfFailureIsCounted) {
  ScriptedServer server([](int number, int fd, const std::string&) {
    using S = ScriptedServer;
    switch (number % 8) {
      case 0: return S::put_json(fd, 429, "{\"error\":{}}"), true;
      case 1: return S::put_json(fd, 500, "oh"), true;
      case 2: S::begin_stream(fd); return S::put_text(fd, "a"), false;  // cut
      case 3:
        S::begin_stream(fd);
        S::put_text(fd, "a");
        return S::put(fd, "0\r\n\r\n"), true;                                           // no end mark
      case 4: S::begin_stream(fd); return S::put_chunk(fd, "data: {\"choi\n\n"), true;  // not JSON
      case 5: return S::put(fd, "nonsense\r\n\r\n"), true;
      case 6: S::begin_stream(fd); return S::put_chunk(fd, "data: {\"error\":{\"message\":\"x\"}}\n\n"), true;
      default: return S::begin_stream(fd), true;  // silence
    }
  });
  LoadLevel level = level_of(1, 8);
  level.timeout = 0.5;
  const ordered_json j = summarize_load(run_load(server.target, level, go_on), {});
  EXPECT_EQ(j["ok"], 0);
  EXPECT_EQ(j["errors"],
            (ordered_json{
                {"cut", 2}, {"http_429", 1}, {"http_500", 1}, {"malformed", 2}, {"stream_error", 1}, {"timeout", 1}}));
}

// MiniMind's own server: no usage, no [DONE], the connection's end as the end of the body.
TEST(RunLoad, AServerThatSaysLittle) {
  ScriptedServer server([](int, int fd, const std::string&) {
    ScriptedServer::put(fd, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n");
    for (const char* text : {"a", "b"})
      ScriptedServer::put(fd, fmt::format("data: {{\"choices\": [{{\"delta\": {{\"content\": \"{}\"}}}}]}}\n\n", text));
    ScriptedServer::put(fd, "data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"stop\"}]}\n\n");
    return false;
  });
  const LoadResult r = run_load(server.target, level_of(2, 6), go_on);
  const ordered_json j = summarize_load(r, {});
  EXPECT_EQ(j["ok"], 6) << j["errors"];
  EXPECT_EQ(j["tokens_from"], "events");
  EXPECT_EQ(j["output_tokens_mean"], 2);
}

TEST(RunLoad, NobodyListening) {
  std::optional<LoadTarget> target;
  {
    target = ScriptedServer([](int, int, const std::string&) { return true; }).target;
  }
  const ordered_json j = summarize_load(run_load(*target, level_of(2, 4), go_on), {});
  EXPECT_EQ(j["errors"], (ordered_json{{"connect", 4}}));
  EXPECT_THROW(http_get(*target, "/health", 1), Error);
}

TEST(RunLoad, AConnectionClosedBetweenRequestsIsNoFailure) {
  ScriptedServer server([](int, int fd, const std::string&) {
    ScriptedServer::put_json(
        fd, 200, "{\"choices\":[{\"message\":{\"content\":\"hello\"}}],\"usage\":{\"completion_tokens\":2}}");
    return false;  // says nothing of it in the head
  });
  LoadLevel level = level_of(2, 20);
  const LoadResult r = run_load(server.target, level, go_on);
  const ordered_json j = summarize_load(r, {});
  EXPECT_EQ(j["ok"], 20);
  EXPECT_TRUE(j["ttft_ms"]["p50"].is_null());  // a whole answer has no first token
  EXPECT_DOUBLE_EQ(r.window_tokens, 40);
}

// A server that stops for a moment: everyone who arrives meanwhile waits, and the measurement must say so although the
// client itself was never blocked from sending.
TEST(RunLoad, OpenLoopCountsFromArrival) {
  std::mutex one_at_a_time;
  ScriptedServer server([&](int, int fd, const std::string&) {
    const std::lock_guard lock(one_at_a_time);
    sleep_ms(20);  // 50 a second at most; 100 arrive
    ScriptedServer::begin_stream(fd);
    ScriptedServer::put_text(fd, "a");
    ScriptedServer::end_stream(fd, 1, 1);
    return true;
  });
  LoadLevel level = level_of(0, 60);
  level.rate = 100;
  level.max_connections = 4;  // requests wait inside the client: still counted
  const LoadResult r = run_load(server.target, level, go_on);
  ASSERT_EQ(r.requests.size(), 60u);
  double worst = 0;
  for (const RequestRecord& q : r.requests) worst = std::max(worst, q.ttft());
  EXPECT_GT(worst, 0.4);  // 60 * 20 ms of work, offered within about 0.6 s
  EXPECT_EQ(server.n_connection, 4);
  const double late = summarize_load(r, {})["late_ms"]["max"].get<double>();
  EXPECT_GT(late, 300);
}

TEST(RunLoad, CancelledAndDroppedRequestsEndTheirConnections) {
  std::atomic<int> n_closed{0};
  ScriptedServer server([&](int, int fd, const std::string&) {
    ScriptedServer::begin_stream(fd);
    for (int i = 0; i < 200; i++) {
      ScriptedServer::put_text(fd, "a");
      char c = 0;
      if (recv(fd, &c, 1, MSG_DONTWAIT) == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) return n_closed++, false;
      sleep_ms(2);
    }
    return ScriptedServer::end_stream(fd, 1, 200), true;
  });
  LoadLevel level = level_of(2, 6);
  level.make = [](uint64_t i) {
    OutRequest r{.body = "{\"messages\":[], \"x\": \"0123456789\"}", .kind = static_cast<int>(i % 3)};
    r.behaviour = i % 3 == 0 ? Behaviour::cancelled : i % 3 == 1 ? Behaviour::dropped : Behaviour::slow_reader;
    r.cancel_after = 5;
    return r;
  };
  const LoadResult r = run_load(server.target, level, go_on);
  EXPECT_EQ(server.n_request, 4);  // a dropped request never arrives whole
  EXPECT_EQ(n_closed, 2);
  for (const RequestRecord& q : r.requests) {
    EXPECT_EQ(q.failure, q.kind == 2 ? Failure::none : Failure::abandoned) << q.kind;
    if (q.kind == 0) {
      EXPECT_GE(q.n_event, 5);
    }
    if (q.kind == 2) {
      EXPECT_EQ(q.n_event, 200);
    }
  }
}

TEST(BenchServe, SweepWritesItsReport) {
  ScriptedServer server([](int, int fd, const std::string& request) {
    if (request.starts_with("GET /v1/models"))
      return ScriptedServer::put_json(fd, 200, "{\"data\":[{\"id\":\"tiny\"}]}"), true;
    EXPECT_NE(request.find("\"model\":\"tiny\""), std::string::npos);
    ScriptedServer::begin_stream(fd);
    for (int i = 0; i < 4; i++) ScriptedServer::put_text(fd, "a");
    ScriptedServer::end_stream(fd, 3, 4);
    return true;
  });
  const std::string folder = testing::TempDir() + "/bench_serve_report";
  std::filesystem::remove_all(folder);
  int shown = 0;
  const ordered_json r = bench_serve(
      {.target = server.target, .clients = {1, 4}, .rates = {200}, .n_request = 20, .slo = slo_from_text("ttft:1000")},
      [&](const ordered_json&) { shown++; });
  write_serve_report(folder, r, "minimind bench serve");
  EXPECT_EQ(shown, 3);
  EXPECT_EQ(r["levels"][1]["ok"], 20);
  EXPECT_EQ(r["levels"][2]["rate"], 200);
  EXPECT_EQ(r["levels"][0]["goodput"]["share"], 1.0);
  EXPECT_EQ(load_json(folder + "/results.json")["model"], "tiny");
  for (const char* file : {"report.md", "throughput_ttft.svg", "throughput_tpot.svg", "ttft_cdf.svg"})
    EXPECT_GT(std::filesystem::file_size(folder + "/" + file), 500u) << file;
  EXPECT_EQ(serve_table_row(r["levels"][0]).find("null"), std::string::npos);
}

TEST(LoadTarget, Urls) {
  EXPECT_EQ(load_target_from_url("http://localhost:8000", "").name(), "localhost:8000");
  EXPECT_EQ(load_target_from_url("http://a.b/v1/", "").name(), "a.b:80");
  EXPECT_EQ(load_target_from_url("http://a:1/x/v1", "").base, "/x");
  EXPECT_EQ(load_target_from_url("http://[::1]:80", "").host, "::1");
  for (const char* bad : {"https://a", "localhost:1", "http://", "http://a:b", "http://:80"})
    EXPECT_THROW(load_target_from_url(bad, "--url"), Error) << bad;
}

}  // namespace
}  // namespace mm
