#include "serve/server.h"

#include <sys/resource.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/post.hpp>
#include <thread>

#include "base/error.h"
#include "base/log.h"
#include "engine/engine.h"
#include "serve/session.h"

namespace mm {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

static ServerOptions checked(ServerOptions o) {
  MM_CHECK(!o.names.empty());
  if (o.tls_cert.empty() != o.tls_key.empty())
    throw Error(o.tls_cert.empty() ? "--tls-cert" : "--tls-key", "a PEM file, as the other one is given", "none");
  return o;
}

static void allow_many_files() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

static std::unique_ptr<asio::ssl::context> open_tls(const ServerOptions& o) {
  if (o.tls_cert.empty()) return nullptr;
  auto tls = std::make_unique<asio::ssl::context>(asio::ssl::context::tls_server);
  error_code ec;
  tls->set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_tlsv1 |
                       asio::ssl::context::no_tlsv1_1 | SSL_OP_NO_RENEGOTIATION,
                   ec);
  tls->use_certificate_chain_file(o.tls_cert, ec);
  if (ec) throw Error("--tls-cert", "a certificate chain in PEM form", o.tls_cert + ": " + ec.message());
  tls->use_private_key_file(o.tls_key, asio::ssl::context::pem, ec);
  if (ec) throw Error("--tls-key", "the certificate's private key in PEM form", o.tls_key + ": " + ec.message());
  return tls;
}

struct Server::Impl {
  Impl(Engine& engine, Tokenizer tokenizer, const ServerOptions& o)
      : service(engine, std::move(tokenizer), checked(o)),
        tls(open_tls(o)),
        n_thread(thread_count(o)),
        workers(n_thread) {
    allow_many_files();
    for (size_t i = 0; i < n_thread; i++) threads.push_back(std::make_unique<IoThread>());
    acceptor = std::make_unique<tcp::acceptor>(threads[0]->io);
    listen();
    asio::post(threads[0]->io, [this] { accept(); });
  }

  ~Impl() {
    asio::post(threads[0]->io, [this] {
      error_code ignored;
      acceptor->close(ignored);
    });
    for (auto& t : threads) t->stop();
    workers.small.join();
    workers.large.join();
    acceptor.reset();
  }

  static size_t thread_count(const ServerOptions& o) {
    if (o.threads > 0) return static_cast<size_t>(o.threads);
    return std::clamp<size_t>(std::thread::hardware_concurrency() / 4, 1, 8);
  }

  void listen() {
    const ServerOptions& o = service.options;
    error_code ec;
    const std::string where = fmt::format("{} port {}", o.host, o.port);
    const auto found =
        tcp::resolver(threads[0]->io).resolve(o.host, std::to_string(o.port), tcp::resolver::passive, ec);
    if (ec || found.empty())
      throw Error("--host", "an address of this machine", fmt::format("{} ({})", o.host, ec.message()));
    const tcp::endpoint endpoint = found.begin()->endpoint();
    if (!endpoint.address().is_loopback() && o.api_key.empty() && !o.insecure) {
      throw Error("--host " + o.host, "an API key where other machines can connect", "none",
                  "set MINIMIND_API_KEY or --api-key-file, or --insecure if everyone who reaches this port may use it");
    }
    acceptor->open(endpoint.protocol(), ec);
    if (!ec) acceptor->set_option(asio::socket_base::reuse_address(true), ec);
    if (!ec) acceptor->bind(endpoint, ec);
    if (!ec) acceptor->listen(asio::socket_base::max_listen_connections, ec);
    if (ec) throw Error(fmt::format("cannot listen on {}: {}", where, ec.message()));
    const auto local = acceptor->local_endpoint();
    const bool brackets = o.host.find(':') != std::string::npos;
    url = fmt::format("{}://{}{}{}:{}", tls != nullptr ? "https" : "http", brackets ? "[" : "", o.host,
                      brackets ? "]" : "", local.port());
  }

  void accept() {
    IoThread& next = *threads[n_accepted++ % threads.size()];
    acceptor->async_accept(next.io, [this, &next](const error_code& ec, tcp::socket socket) {
      if (ec == asio::error::operation_aborted || !acceptor->is_open()) return;
      if (ec) {  // out of descriptors, say: a moment later some may be free
        const auto timer = std::make_shared<asio::steady_timer>(threads[0]->io, std::chrono::milliseconds(100));
        timer->async_wait([this, timer](const error_code& stopped) {
          if (!stopped && acceptor->is_open()) accept();
        });
        return;
      }
      if (service.n_connection >= service.options.max_connections) {
        turn_away(socket);
      } else {
        asio::post(next.io, [this, &next, s = std::move(socket)]() mutable {
          start_session(next, service, workers, std::move(s), tls.get());
        });
      }
      accept();
    });
  }

  void turn_away(tcp::socket& socket) {
    ApiError error(503, "too_many_connections", "", "The server has as many connections as it takes.");
    error.retry_after = 1;
    const Reply reply = error_reply(error);
    HttpRequest request;
    request.keep_alive = false;
    error_code ignored;
    socket.non_blocking(true, ignored);
    if (tls == nullptr)
      socket.write_some(asio::buffer(reply_head(reply, static_cast<int64_t>(reply.body.size()), request) + reply.body),
                        ignored);
    service.metrics.count_http(route_name(Route::unknown), error.status);
  }

  Service service;
  std::unique_ptr<asio::ssl::context> tls;
  const size_t n_thread;
  Workers workers;
  std::vector<std::unique_ptr<IoThread>> threads;
  std::unique_ptr<tcp::acceptor> acceptor;
  size_t n_accepted = 0;
  std::string url;
};

Server::Server(Engine& engine, Tokenizer tokenizer, const ServerOptions& options)
    : impl_(std::make_unique<Impl>(engine, std::move(tokenizer), options)) {}

Server::~Server() = default;

std::string Server::url() const { return impl_->url; }

void Server::drain(double seconds) {
  Service& service = impl_->service;
  service.draining = true;
  service.engine.drain(seconds);
  // The last texts still go out, to those who read them.
  for (int i = 0; i < 100 && service.n_connection > 0; i++) std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

}  // namespace mm
