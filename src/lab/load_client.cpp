#include "lab/load_client.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/progress.h"
#include "lab/http_reader.h"
#include "lab/load_plan.h"

namespace mm {

LoadTarget load_target_from_url(const std::string& url, const std::string& flag) {
  const std::string scheme = "http://";
  if (!url.starts_with(scheme))
    throw Error(flag, "http://HOST:PORT", fmt::format("\"{}\"", url), "put a TLS server behind a plain local port");
  std::string rest = url.substr(scheme.size());
  LoadTarget t;
  if (const size_t slash = rest.find('/'); slash != std::string::npos) {
    t.base = rest.substr(slash);
    rest.resize(slash);
  }
  while (t.base.ends_with("/")) t.base.pop_back();
  if (t.base.ends_with("/v1")) t.base.resize(t.base.size() - 3);  // the form that OpenAI's client takes
  const size_t colon = rest.rfind(':');
  t.host = rest.substr(0, colon);
  t.port = colon == std::string::npos ? "80" : rest.substr(colon + 1);
  if (t.host.starts_with("[") && t.host.ends_with("]")) t.host = t.host.substr(1, t.host.size() - 2);
  if (t.host.empty() || t.port.empty() || t.port.find_first_not_of("0123456789") != std::string::npos)
    throw Error(flag, "http://HOST:PORT", fmt::format("\"{}\"", url));
  return t;
}

namespace {

struct Address {
  sockaddr_storage data{};
  socklen_t size = 0;
  int family = 0;
};

Address resolve(const LoadTarget& t) {
  addrinfo hints{}, *list = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (const int rc = getaddrinfo(t.host.c_str(), t.port.c_str(), &hints, &list); rc != 0)
    throw Error(t.name(), "a host that can be found", gai_strerror(rc));
  Address a;
  std::memcpy(&a.data, list->ai_addr, list->ai_addrlen);
  a.size = list->ai_addrlen;
  a.family = list->ai_family;
  freeaddrinfo(list);
  return a;
}

std::string request_head(const LoadTarget& t, const char* method, const std::string& path, size_t body, bool keep) {
  std::string s = fmt::format("{} {}{} HTTP/1.1\r\nHost: {}:{}\r\nConnection: {}\r\n", method, t.base, path, t.host,
                              t.port, keep ? "keep-alive" : "close");
  if (!t.api_key.empty()) s += fmt::format("Authorization: Bearer {}\r\n", t.api_key);
  if (body > 0) s += fmt::format("Content-Type: application/json\r\nContent-Length: {}\r\n", body);
  return s + "\r\n";
}

// What all workers share.
struct Shared {
  const LoadTarget& target;
  const LoadLevel& level;
  const Address address;
  std::vector<double> arrivals;  // open loop, seconds after start
  double start = 0;
  std::atomic<int64_t> next{0};  // closed loop: number of the next request
  std::atomic<double> begin{INFINITY}, end{INFINITY};
  std::atomic<bool> stop{false};
  std::atomic<int> n_working{0};
  LoadCounts counts;
};

struct Connection {
  enum class State { closed, connecting, sending, receiving, idle };
  int fd = -1;
  State state = State::closed;
  bool used = false;      // a request has been answered on it
  bool answered = false;  // bytes of the present answer have come
  RequestRecord record;
  OutRequest request;
  std::string out, body;
  size_t n_out = 0;
  HttpReader http;
  SseReader sse;
  AnswerFacts facts;
  bool done_mark = false, malformed = false;
  int64_t window_events = 0;
  double wait_until = 0;  // closed loop, after a failure
};

class Worker {
 public:
  Worker(Shared& shared, int number) : s_(shared), number_(number) {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    MM_CHECK(epoll_ >= 0 && timer_ >= 0);
    epoll_event e{.events = EPOLLIN, .data = {.ptr = nullptr}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, timer_, &e);
    if (!open_loop()) {
      for (int64_t i = number_; i < s_.level.clients; i += s_.level.workers) {
        connections_.push_back(std::make_unique<Connection>());
        ready_.push_back(connections_.back().get());
      }
    } else {
      next_arrival_ = number_;
    }
  }
  ~Worker() {
    for (const auto& c : connections_) close_socket(*c);
    ::close(timer_);
    ::close(epoll_);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run() {
    const double began = now_seconds();
    std::vector<epoll_event> events(256);
    while (!s_.stop) {
      now_ = now_seconds();
      start_what_is_due();
      if (n_active_ == 0 && nothing_left()) break;
      const int n = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), 50);
      for (int i = 0; i < n; i++) {
        now_ = now_seconds();
        if (auto* c = static_cast<Connection*>(events[static_cast<size_t>(i)].data.ptr)) {
          on_event(*c, events[static_cast<size_t>(i)].events);
        } else {
          uint64_t ticks = 0;
          [[maybe_unused]] const ssize_t got = read(timer_, &ticks, sizeof ticks);
        }
      }
      if (now_ - last_check_ >= 0.05) check_all();
    }
    for (const auto& c : connections_) {
      if (active(*c)) end_request(*c, Failure::abandoned);
    }
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    cpu_seconds = seconds(usage.ru_utime) + seconds(usage.ru_stime);
    busy_share = cpu_seconds / std::max(now_seconds() - began, 1e-9);
  }

  std::vector<RequestRecord> records;
  std::vector<float> gaps;
  double window_tokens = 0, cpu_seconds = 0, busy_share = 0;
  int64_t n_reconnect = 0;

 private:
  bool open_loop() const { return s_.level.rate > 0; }
  static bool active(const Connection& c) {
    return c.state != Connection::State::closed && c.state != Connection::State::idle;
  }
  int64_t n_total() const { return s_.level.warmup + s_.level.n_request; }
  bool in_window() const { return now_ >= s_.begin && now_ < s_.end; }

  bool nothing_left() const {
    if (open_loop()) return next_arrival_ >= static_cast<int64_t>(s_.arrivals.size());
    return closed_loop_over() || connections_.empty();
  }
  bool closed_loop_over() const { return s_.level.n_request > 0 ? s_.next.load() >= n_total() : now_ >= s_.end; }

  void start_what_is_due() {
    if (!open_loop()) {
      for (size_t i = 0; i < ready_.size();) {
        Connection& c = *ready_[i];
        if (closed_loop_over()) return;
        if (c.wait_until > now_) {
          i++;
          continue;
        }
        const int64_t number = s_.next++;
        if (s_.level.n_request > 0 && number >= n_total()) return;
        ready_[i] = ready_.back();
        ready_.pop_back();
        begin_request(c, number, now_);
      }
      return;
    }
    for (; next_arrival_ < static_cast<int64_t>(s_.arrivals.size()); next_arrival_ += s_.level.workers) {
      const double due = s_.start + s_.arrivals[static_cast<size_t>(next_arrival_)];
      if (due > now_) {
        set_timer(due - now_);
        return;
      }
      if (n_active_ >= std::max<int64_t>(s_.level.max_connections / s_.level.workers, 1))
        return;  // a later end wakes us
      if (ready_.empty()) {
        connections_.push_back(std::make_unique<Connection>());
        ready_.push_back(connections_.back().get());
      }
      Connection& c = *ready_.back();
      ready_.pop_back();
      begin_request(c, next_arrival_, due);
    }
  }

  void set_timer(double seconds) {
    const auto whole = static_cast<time_t>(seconds);
    const itimerspec t{
        .it_interval = {},
        .it_value = {.tv_sec = whole,
                     .tv_nsec = std::max(1L, static_cast<long>((seconds - static_cast<double>(whole)) * 1e9))}};
    timerfd_settime(timer_, 0, &t, nullptr);
  }

  void begin_request(Connection& c, int64_t number, double due) {
    c.request = s_.level.make(static_cast<uint64_t>(number));
    c.record = RequestRecord{.due = due, .measured = number >= s_.level.warmup};
    c.record.kind = c.request.kind;
    c.record.max_tokens = c.request.max_tokens;
    if (number == s_.level.warmup) {
      s_.begin = due;
      if (s_.level.n_request == 0) s_.end = due + s_.level.seconds;
    }
    c.out =
        request_head(s_.target, "POST", c.request.path, c.request.body.size(), s_.level.keep_alive) + c.request.body;
    if (c.request.behaviour == Behaviour::dropped) c.out.resize(c.out.size() - c.request.body.size() / 2 - 1);
    if (c.request.behaviour == Behaviour::slow_reader) close_socket(c);  // its window is set before it connects
    n_active_++;
    s_.counts.active++;
    s_.counts.sent++;
    send_request(c);
  }

  // Sends what c.out holds, over a new connection where there is none.
  void send_request(Connection& c) {
    c.n_out = 0;
    c.body.clear();
    c.http.reset();
    c.sse.reset();
    c.facts = {};
    c.done_mark = c.malformed = c.answered = false;
    c.window_events = 0;
    if (c.fd >= 0) {
      c.state = Connection::State::sending;
      return write_some(c);
    }
    c.used = false;
    c.fd = socket(s_.address.family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c.fd < 0) return end_request(c, Failure::connect);
    const int one = 1, small = 4096;
    setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (c.request.behaviour == Behaviour::slow_reader) setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    const int rc = connect(c.fd, reinterpret_cast<const sockaddr*>(&s_.address.data), s_.address.size);
    if (rc != 0 && errno != EINPROGRESS) return end_request(c, Failure::connect);
    c.state = Connection::State::connecting;
    epoll_event e{.events = EPOLLOUT, .data = {.ptr = &c}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, c.fd, &e);
  }

  void watch(Connection& c, uint32_t what) {
    epoll_event e{.events = what, .data = {.ptr = &c}};
    epoll_ctl(epoll_, EPOLL_CTL_MOD, c.fd, &e);
  }

  void on_event(Connection& c, uint32_t what) {
    if (c.state == Connection::State::connecting) {
      int error = 0;
      socklen_t size = sizeof error;
      getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return end_request(c, Failure::connect);
      c.state = Connection::State::sending;
    }
    if (c.state == Connection::State::sending && (what & EPOLLOUT) != 0) return write_some(c);
    if (c.state == Connection::State::closed) return;
    read_some(c);
  }

  void write_some(Connection& c) {
    while (c.n_out < c.out.size()) {
      const ssize_t n = send(c.fd, c.out.data() + c.n_out, c.out.size() - c.n_out, MSG_NOSIGNAL);
      if (n < 0 && errno == EAGAIN) return watch(c, EPOLLOUT | EPOLLIN);
      // A server that refuses early (a body too large) answers before it closes: its answer is read first.
      if (n < 0 && c.n_out == 0) return connection_lost(c);
      if (n < 0) break;
      if (c.n_out == 0) c.record.sent = now_seconds();
      c.n_out += static_cast<size_t>(n);
    }
    if (c.request.behaviour == Behaviour::dropped) return end_request(c, Failure::abandoned);
    c.state = Connection::State::receiving;
    watch(c, c.request.behaviour == Behaviour::slow_reader ? 0u : uint32_t{EPOLLIN});
  }

  void read_some(Connection& c) {
    const size_t limit = c.request.behaviour == Behaviour::slow_reader && active(c) ? 256 : buffer_.size();
    const ssize_t n = recv(c.fd, buffer_.data(), limit, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (c.state == Connection::State::idle) return close_socket(c);  // the server ended a connection we kept
    if (n <= 0) return connection_lost(c);
    c.answered = true;
    const HttpReader::State state = c.http.feed({buffer_.data(), static_cast<size_t>(n)}, c.body);
    if (state == HttpReader::State::bad) return end_request(c, Failure::malformed);
    if (c.request.stream && c.http.status() == 200 && c.http.event_stream()) {
      c.sse.feed(c.body, [&](std::string_view data) { on_data(c, data); });
      c.body.clear();
      if (c.facts.error) return end_request(c, Failure::stream_error);
      if (c.malformed) return end_request(c, Failure::malformed);
      if (c.request.behaviour == Behaviour::cancelled && c.record.n_event >= c.request.cancel_after)
        return end_request(c, Failure::abandoned);
    }
    if (state == HttpReader::State::done) end_answer(c);
  }

  void on_data(Connection& c, std::string_view data) {
    if (data == "[DONE]") {
      c.done_mark = true;
      return;
    }
    c.facts.has_text = false;
    if (!read_answer(data, c.facts)) c.malformed = true;
    if (!c.facts.has_text) return;
    RequestRecord& r = c.record;
    if (r.n_event++ == 0) r.first = now_;
    else if (r.measured) gaps.push_back(static_cast<float>(now_ - r.last));
    r.last = now_;
    c.window_events += in_window();
    s_.counts.events.fetch_add(1, std::memory_order_relaxed);
  }

  void end_answer(Connection& c) {
    if (c.http.status() != 200) return end_request(c, Failure::http);
    const bool stream = c.request.stream && c.http.event_stream();
    if (!stream && !read_answer(c.body, c.facts)) return end_request(c, Failure::malformed);
    if (c.facts.error) return end_request(c, Failure::stream_error);
    end_request(c, !stream || c.done_mark || c.facts.has_finish ? Failure::none : Failure::cut);
  }

  void connection_lost(Connection& c) {
    if (c.http.state() != HttpReader::State::done && c.http.closed() == HttpReader::State::done) return end_answer(c);
    const bool kept_too_long = c.used && !c.answered;  // the server closed it while we were about to use it
    close_socket(c);
    if (kept_too_long) {
      n_reconnect++;
      return send_request(c);
    }
    c.state = Connection::State::receiving;
    end_request(c, c.record.sent > 0 ? Failure::cut : Failure::connect);
  }

  void end_request(Connection& c, Failure failure) {
    RequestRecord& r = c.record;
    r.end = now_;
    r.failure = failure;
    r.status = c.http.status();
    r.by_length = c.facts.by_length;
    r.done_mark = c.done_mark;
    r.prompt_tokens = c.facts.prompt_tokens;
    r.cached_tokens = c.facts.cached_tokens;
    r.usage = c.facts.completion_tokens;
    const auto tokens = static_cast<double>(r.output_tokens());
    if (r.n_event > 0) window_tokens += tokens * static_cast<double>(c.window_events) / static_cast<double>(r.n_event);
    else if (in_window() && failure == Failure::none) window_tokens += tokens;
    records.push_back(r);
    n_active_--;
    s_.counts.active--;
    if (failure == Failure::none) s_.counts.done++;
    else if (failure != Failure::abandoned) s_.counts.failed++;

    const bool whole = failure == Failure::none || failure == Failure::http;
    c.used = true;
    if (whole && s_.level.keep_alive && c.http.keep_alive() && c.http.state() == HttpReader::State::done &&
        c.n_out == c.out.size() && c.request.behaviour == Behaviour::normal) {
      c.state = Connection::State::idle;
    } else {
      close_socket(c);
    }
    // A refused client of a closed loop comes back after a moment, as a person or a library would.
    if (failure != Failure::none && failure != Failure::abandoned)
      c.wait_until = now_ + std::clamp(c.http.retry_after(), 0.1, 1.0);
    ready_.push_back(&c);
  }

  void close_socket(Connection& c) {
    if (c.fd >= 0) ::close(c.fd);
    c.fd = -1;
    c.state = Connection::State::closed;
  }

  void check_all() {
    last_check_ = now_;
    for (const auto& c : connections_) {
      if (!active(*c)) continue;
      if (now_ - c->record.due > s_.level.timeout) end_request(*c, Failure::timeout);
      else if (c->request.behaviour == Behaviour::slow_reader && c->state == Connection::State::receiving)
        read_some(*c);
    }
  }

  Shared& s_;
  const int number_;
  int epoll_ = -1, timer_ = -1;
  double now_ = 0, last_check_ = 0;
  int64_t n_active_ = 0, next_arrival_ = 0;
  std::vector<std::unique_ptr<Connection>> connections_;
  std::vector<Connection*> ready_;  // without a request
  std::vector<char> buffer_ = std::vector<char>(256 << 10);
};

}  // namespace

HttpAnswer http_get(const LoadTarget& target, const std::string& path, double timeout_seconds) {
  const Address address = resolve(target);
  const int fd = socket(address.family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw system_error("no socket", target.name());
  const std::unique_ptr<const int, void (*)(const int*)> closer(&fd, [](const int* f) { ::close(*f); });
  const timeval timeout{.tv_sec = static_cast<time_t>(timeout_seconds),
                        .tv_usec = static_cast<suseconds_t>(std::fmod(timeout_seconds, 1.0) * 1e6)};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address.data), address.size) != 0)
    throw Error(target.name(), "a server", std::strerror(errno), "start it, or give its address with --url");
  const std::string head = request_head(target, "GET", path, 0, false);
  if (send(fd, head.data(), head.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(head.size()))
    throw system_error("cannot send", target.name());
  HttpReader http;
  HttpAnswer answer;
  std::vector<char> buffer(64 << 10);
  while (http.state() != HttpReader::State::done) {
    const ssize_t n = recv(fd, buffer.data(), buffer.size(), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n > 0) http.feed({buffer.data(), static_cast<size_t>(n)}, answer.body);
    else http.closed();
    if (http.state() == HttpReader::State::bad || (n <= 0 && http.state() != HttpReader::State::done))
      throw Error(target.name() + path, "an HTTP answer", n < 0 ? std::strerror(errno) : "a broken one");
  }
  answer.status = http.status();
  return answer;
}

LoadResult run_load(const LoadTarget& target, const LoadLevel& level,
                    const std::function<bool(const LoadCounts&)>& tick) {
  MM_CHECK((level.clients > 0) != (level.rate > 0));
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  Shared shared{.target = target, .level = level, .address = resolve(target)};
  if (level.rate > 0) {
    const double mean = static_cast<double>(level.warmup) + level.rate * level.seconds;
    const auto n =
        level.n_request > 0 ? level.warmup + level.n_request : static_cast<int64_t>(mean + 10 * std::sqrt(mean) + 100);
    shared.arrivals = poisson_arrivals(level.rate, n, level.seed);
    if (level.n_request == 0) {
      const double last = shared.arrivals[static_cast<size_t>(level.warmup)] + level.seconds;
      std::erase_if(shared.arrivals, [&](double t) { return t >= last; });
    }
  }
  shared.start = now_seconds() + 0.01;
  std::vector<std::unique_ptr<Worker>> workers;
  workers.reserve(static_cast<size_t>(level.workers));
  for (int i = 0; i < level.workers; i++) workers.push_back(std::make_unique<Worker>(shared, i));
  shared.n_working = level.workers;
  std::vector<std::jthread> threads;
  threads.reserve(workers.size());
  for (const auto& w : workers) {
    threads.emplace_back([&shared, worker = w.get()] {
      worker->run();
      shared.n_working--;
    });
  }
  LoadResult result;
  while (shared.n_working > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (!tick(shared.counts) && !shared.stop.exchange(true)) result.interrupted = true;
  }
  threads.clear();

  double last = shared.begin;
  for (const auto& w : workers) {
    for (const RequestRecord& r : w->records) {
      if (!r.measured) continue;
      last = std::max(last, r.end);
      result.requests.push_back(r);
    }
    result.gaps.insert(result.gaps.end(), w->gaps.begin(), w->gaps.end());
    result.window_tokens += w->window_tokens;
    result.cpu_seconds += w->cpu_seconds;
    result.busiest_worker = std::max(result.busiest_worker, w->busy_share);
    result.n_reconnect += w->n_reconnect;
  }
  if (std::isfinite(shared.begin)) result.window_seconds = std::min(last, shared.end.load()) - shared.begin;
  // A short answer to all requests ends a timed window early only when the run was interrupted.
  if (level.n_request == 0 && !result.interrupted && std::isfinite(shared.begin)) result.window_seconds = level.seconds;
  return result;
}

}  // namespace mm
