#include "serve/session.h"

#include <fmt/format.h>

#include <boost/asio/post.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <iterator>
#include <optional>

#include "base/log.h"

namespace mm {

namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;
using TlsStream = asio::ssl::stream<tcp::socket>;

constexpr size_t kHeaderLimit = 16 << 10;
constexpr size_t kReadAhead = 64 << 10;  // bytes of further requests, or of anything without an end, kept at most
constexpr size_t kLargeBody = 64 << 10;  // read and encoded apart
constexpr double kLingerSeconds = 3;
constexpr double kDrainGraceSeconds = 1;  // for a request that is on its way when draining begins

Clock::duration seconds(double s) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
}

template <class Stream>
class Session : public Connection, public std::enable_shared_from_this<Session<Stream>> {
 public:
  Session(IoThread& thread, Service& service, Workers& workers, Stream stream)
      : thread_(thread), service_(service), workers_(workers), stream_(std::move(stream)) {
    service_.n_connection++;
  }
  ~Session() override { service_.n_connection--; }

  void start() {
    thread_.connections.insert(this->shared_from_this());
    error_code ignored;
    socket().set_option(tcp::no_delay(true), ignored);
    socket().set_option(tcp::socket::send_buffer_size(256 << 10),
                        ignored);  // what a slow reader can hold in the kernel
    if (const auto peer = socket().remote_endpoint(ignored); !ignored) peer_ = peer.address().to_string();
    begun_ = Clock::now();
    wait_until(service_.options.read_seconds);
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      state_ = State::handshake;
      stream_.async_handshake(asio::ssl::stream_base::server, [self = this->shared_from_this()](const error_code& ec) {
        if (self->state_ == State::closed) return;
        if (ec) return self->drop();
        self->become_idle();
        self->read_more();
      });
    } else {
      become_idle();
      read_more();
    }
  }

  void pump() override {
    if (state_ != State::busy || exchange_ == nullptr) return;
    Exchange& x = *exchange_;
    if (x.error() && !head_sent_) {
      answer(error_reply(*x.error()));
    } else if (x.streams()) {
      if (x.error()) append_stream_error(*x.error(), x.out());
      send_stream(x.out());
      x.out().clear();
      if (x.error() || x.done()) end_stream();
    } else if (x.done()) {
      Reply reply{.body = std::move(x.out())};
      reply.headers.emplace_back("X-Request-Id", x.id());
      answer(std::move(reply));
    }
    if (out_.size() + writing_.size() - written_ > static_cast<size_t>(service_.options.max_pending) && head_sent_) {
      service_.metrics.slow_clients++;
      return drop();
    }
    start_write();
    resume();
  }

  void tick(Clock::time_point now) override {
    const auto keep = this->shared_from_this();
    if (writing_op_ && now > progress_ + seconds(service_.options.write_seconds)) {
      service_.metrics.slow_clients++;
      return drop();
    }
    switch (state_) {
      case State::handshake:
      case State::lingering:
        if (now > deadline_) drop();
        break;
      case State::idle:
        if (!writing_op_ && (now > deadline_ || (service_.draining && now > begun_ + seconds(kDrainGraceSeconds))))
          drop();
        break;
      case State::reading:
        if (now > deadline_) refuse_and_close({408, "request_timeout", "", "The request did not arrive in time."});
        break;
      case State::busy:
        if (exchange_ != nullptr && exchange_->streams() &&
            now > last_output_ + seconds(service_.options.comment_seconds)) {
          send_stream(": waiting\n\n");
          start_write();
        }
        break;
      case State::closed: break;
    }
  }

  void drop() override {
    if (state_ == State::closed) return;
    state_ = State::closed;
    if (exchange_ != nullptr) {
      service_.metrics.disconnects++;
      exchange_->abandon();
      exchange_.reset();
    }
    error_code ignored;
    socket().close(ignored);
    thread_.connections.erase(this->shared_from_this());
  }

 private:
  enum class State {
    handshake,
    idle,       // between requests
    reading,    // a request has begun
    busy,       // it is being answered
    lingering,  // the last answer is out; what still comes is thrown away, so that closing does not take the answer
                // back
    closed,
  };

  auto& socket() { return stream_.lowest_layer(); }
  void wait_until(double s) { deadline_ = Clock::now() + seconds(s); }

  void become_idle() {
    state_ = State::idle;
    wait_until(service_.options.idle_seconds);
  }

  // --- reading -------------------------------------------------------------------------------------------------------

  void read_more() {
    if (reading_op_ || state_ == State::closed || in_.size() >= kReadAhead) return;
    reading_op_ = true;
    stream_.async_read_some(asio::buffer(chunk_), [self = this->shared_from_this()](const error_code& ec, size_t n) {
      self->reading_op_ = false;
      self->received(ec, n);
    });
  }

  void received(const error_code& ec, size_t n) {
    if (state_ == State::closed) return;
    if (ec) {
      // A client that has sent all may be reading the end of its answer still.
      if (state_ == State::idle && writing_op_) closing_ = true;
      else drop();
      return;
    }
    if (state_ != State::lingering) {
      in_.append(chunk_.data(), n);
      parse();
      start_write();
    }
    read_more();
  }

  void resume() {
    parse();
    start_write();
    read_more();
  }

  // Requests out of in_, until more bytes are needed, one is being answered, or the answers pile up.
  void parse() {
    while ((state_ == State::idle || state_ == State::reading) && !closing_ && !in_.empty() &&
           out_.size() < kReadAhead) {
      if (state_ == State::idle) begin_request();
      error_code ec;
      const size_t n = parser_->put(asio::buffer(in_), ec);
      in_.erase(0, n);
      if (ec == http::error::need_more) {
        if (in_.size() >= kReadAhead) ec = http::error::bad_chunk;
        else ec = {};
      }
      if (ec) return refuse_and_close(parse_error(ec));
      if (parser_->is_header_done() && !head_checked_) {
        head_checked_ = true;
        wait_until(service_.options.read_seconds * 4);
        check_head();
        if (state_ != State::reading) continue;
      }
      if (parser_->is_done()) handle();
      else if (n == 0) return;
    }
  }

  void begin_request() {
    parser_.emplace();
    parser_->header_limit(kHeaderLimit);
    parser_->body_limit(static_cast<uint64_t>(service_.options.max_body));
    request_ = {};
    head_checked_ = head_sent_ = false;
    state_ = State::reading;
    begun_ = Clock::now();
    wait_until(service_.options.read_seconds);
  }

  ApiError parse_error(const error_code& ec) const {
    if (ec == http::error::body_limit) {
      return {413, "request_too_large", "",
              fmt::format("The body is larger than the {} bytes that this server takes.", service_.options.max_body)};
    }
    if (ec == http::error::header_limit) return {431, "headers_too_large", "", "The header is larger than 16 KB."};
    if (ec == http::error::bad_version) return {505, "invalid_http", "", "Version 1.1 or 1.0 of HTTP is expected."};
    return {400, "invalid_http", "", "The request is not valid HTTP: " + ec.message() + "."};
  }

  // What two servers might read differently is refused: where one request ends decides where the next begins.
  std::optional<ApiError> odd_head(const http::request<http::string_body>& r) const {
    const auto bad = [](const char* what) { return ApiError(400, "invalid_http", "", what); };
    if (r.version() != 11 && r.version() != 10)
      return ApiError(505, "invalid_http", "", "Version 1.1 or 1.0 of HTTP is expected.");
    if (r.count(http::field::host) > 1 || (r.version() == 11 && r.count(http::field::host) == 0))
      return bad("Exactly one Host header is expected.");
    if (r.count(http::field::content_length) > 1) return bad("More than one Content-Length header.");
    const auto codings = r.count(http::field::transfer_encoding);
    if (codings > 0 &&
        (codings > 1 || r.version() == 10 || !boost::beast::iequals(r[http::field::transfer_encoding], "chunked")))
      return ApiError(501, "invalid_http", "", "Of transfer encodings only \"chunked\" is supported.");
    return std::nullopt;
  }

  // May answer at once.
  void check_head() {
    const auto& r = parser_->get();
    const auto text = [&](http::field f) { return std::string(r[f]); };
    request_.method = std::string(r.method_string());
    request_.keep_alive = r.keep_alive();
    request_.chunked_ok = r.version() == 11;
    if (const auto error = odd_head(r)) return refuse_and_close(*error);
    std::string_view target(r.target().data(), r.target().size());
    for (const std::string_view scheme : {"http://", "https://"})  // a proxy's form
      if (target.starts_with(scheme)) target = target.substr(std::min(target.find('/', scheme.size()), target.size()));
    if (!target.starts_with('/') && target != "*")
      return refuse_and_close({400, "invalid_http", "", "A path is expected."});
    request_.path = std::string(target.substr(0, target.find('?')));
    request_.route = find_route(request_.path);
    if (r.count(http::field::host) > 0) request_.host = text(http::field::host);
    request_.origin = text(http::field::origin);
    request_.authorization = text(http::field::authorization);
    request_.if_none_match = text(http::field::if_none_match);
    const auto [coding, codings_end] = r.equal_range(http::field::content_encoding);
    for (auto it = coding; it != codings_end; ++it)
      if (!boost::beast::iequals(it->value(), "identity")) request_.content_encoding = std::string(it->value());
    if (auto refused = service_.refuse(request_)) {
      if (!parser_->is_done()) return refuse_and_close(std::move(*refused));
      return answer(std::move(*refused));
    }
    if (r.version() == 11 && boost::beast::iequals(r[http::field::expect], "100-continue") && !parser_->is_done())
      out_ += "HTTP/1.1 100 Continue\r\n\r\n";
  }

  void handle() {
    state_ = State::busy;
    if (request_.route == Route::blocks) {  // waits for the engine
      return work(workers_.small, [self = this->shared_from_this()] { return self->service_.get(self->request_); });
    }
    if (request_.route > Route::detokenize) return answer(service_.get(request_));
    std::string body = std::move(parser_->get().body());
    auto& pool = body.size() > kLargeBody ? workers_.large : workers_.small;
    work(pool, [self = this->shared_from_this(), route = request_.route, text = std::move(body)] {
      return self->service_.post(route, text);
    });
  }

  // `job` on another thread, what it returns to prepared() on ours.
  template <class Job>
  void work(asio::thread_pool& pool, Job job) {
    asio::post(pool, [self = this->shared_from_this(), j = std::move(job)] {
      asio::post(self->thread_.io,
                 [self, r = std::variant<Reply, ApiCall>(j())]() mutable { self->prepared(std::move(r)); });
    });
  }

  void prepared(std::variant<Reply, ApiCall>&& result) {
    if (state_ != State::busy) return;  // the client left
    if (auto* reply = std::get_if<Reply>(&result)) {
      answer(std::move(*reply));
      start_write();
      return resume();
    }
    last_output_ = Clock::now();
    auto& call = std::get<ApiCall>(result);
    for (auto& r : call.requests)
      if (r.client.empty()) r.client = peer_;
    exchange_ = std::make_shared<Exchange>(service_, thread_.inbox, std::move(call), this);
    exchange_->start();
    if (exchange_->error()) pump();
  }

  // --- answering -----------------------------------------------------------------------------------------------------

  // The whole answer to the current request, which ends with it.
  void answer(Reply reply) {
    service_.add_cors(request_, reply);
    service_.metrics.count_http(route_name(request_.route), reply.status);
    const bool bodiless = request_.method == "HEAD" || reply.status == 204 || reply.status == 304;
    out_ += reply_head(reply, static_cast<int64_t>(reply.body.size()), request_);
    if (!bodiless) out_ += reply.body;
    status_ = reply.status;
    end_request();
  }

  void refuse_and_close(Reply reply) {
    request_.keep_alive = false;
    answer(std::move(reply));
    start_write();
  }
  void refuse_and_close(const ApiError& error) { refuse_and_close(error_reply(error)); }

  void send_stream(std::string_view text) {
    if (text.empty()) return;
    if (!head_sent_) {
      head_sent_ = true;
      if (!request_.chunked_ok) request_.keep_alive = false;
      Reply reply{.type = "text/event-stream; charset=utf-8"};
      reply.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}, {"X-Request-Id", exchange_->id()}};
      service_.add_cors(request_, reply);
      service_.metrics.count_http(route_name(request_.route), reply.status);
      out_ += reply_head(reply, -1, request_);
      status_ = reply.status;
    }
    last_output_ = Clock::now();
    if (request_.chunked_ok) fmt::format_to(std::back_inserter(out_), "{:x}\r\n", text.size());
    out_ += text;
    if (request_.chunked_ok) out_ += "\r\n";
  }

  void end_stream() {
    if (request_.chunked_ok) out_ += "0\r\n\r\n";
    end_request();
  }

  void end_request() {
    log_debug("{} {} {} {} {:.1f} ms", peer_, request_.method, request_.path, status_,
              std::chrono::duration<double, std::milli>(Clock::now() - begun_).count());
    exchange_.reset();
    parser_.reset();
    if (!request_.keep_alive || service_.draining) closing_ = true;
    become_idle();
  }

  // --- writing -------------------------------------------------------------------------------------------------------

  void start_write() {
    if (writing_op_ || state_ == State::closed) return;
    if (out_.empty()) {
      if (closing_ && state_ != State::lingering) linger();
      return;
    }
    std::swap(out_, writing_);
    written_ = 0;
    progress_ = Clock::now();
    write_some();
  }

  void write_some() {
    writing_op_ = true;
    stream_.async_write_some(asio::buffer(writing_.data() + written_, writing_.size() - written_),
                             [self = this->shared_from_this()](const error_code& ec, size_t n) { self->sent(ec, n); });
  }

  void sent(const error_code& ec, size_t n) {
    writing_op_ = false;
    if (state_ == State::closed) return;
    if (ec) return drop();
    progress_ = Clock::now();
    written_ += n;
    if (written_ < writing_.size()) return write_some();
    if (writing_.capacity() > kReadAhead) writing_ = {};  // a large answer does not stay with an idle connection
    writing_.clear();
    written_ = 0;
    start_write();
    if (!writing_op_) resume();
  }

  void linger() {
    state_ = State::lingering;
    wait_until(service_.draining ? kLingerSeconds / 6 : kLingerSeconds);
    in_ = {};
    if constexpr (std::is_same_v<Stream, TlsStream>) {
      stream_.async_shutdown([self = this->shared_from_this()](const error_code&) { self->drop(); });
    } else {
      error_code ignored;
      socket().shutdown(tcp::socket::shutdown_send, ignored);
      read_more();
    }
  }

  IoThread& thread_;
  Service& service_;
  Workers& workers_;
  Stream stream_;
  State state_ = State::idle;
  Clock::time_point deadline_, progress_, last_output_;
  Clock::time_point begun_;  // the connection, then its last request
  int status_ = 0;
  std::array<char, 16 << 10> chunk_;
  std::string peer_;  // its address; the client in whose name it asks, where a request names none
  std::string in_, out_, writing_;
  size_t written_ = 0;  // of writing_
  bool reading_op_ = false, writing_op_ = false, closing_ = false, head_checked_ = false, head_sent_ = false;
  std::optional<http::request_parser<http::string_body>> parser_;
  HttpRequest request_;
  std::shared_ptr<Exchange> exchange_;
};

}  // namespace

void start_session(IoThread& thread, Service& service, Workers& workers, tcp::socket socket, asio::ssl::context* tls) {
  if (tls != nullptr) {
    std::make_shared<Session<TlsStream>>(thread, service, workers, TlsStream(std::move(socket), *tls))->start();
  } else {
    std::make_shared<Session<tcp::socket>>(thread, service, workers, std::move(socket))->start();
  }
}

}  // namespace mm
