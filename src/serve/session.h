// A connection: reads requests, one after the other, and writes what they are answered with.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/thread_pool.hpp>

#include "serve/io_thread.h"

namespace mm {

// Where bodies are read and encoded: small ones on as many threads as there are for connections, large ones one after
// the other, so that they delay each other alone.
struct Workers {
  explicit Workers(size_t n) : small(n), large(1) {}
  boost::asio::thread_pool small, large;
};

// Call on the thread; `tls` null: plain.
void start_session(IoThread& thread, Service& service, Workers& workers, boost::asio::ip::tcp::socket socket,
                   boost::asio::ssl::context* tls);

}  // namespace mm
