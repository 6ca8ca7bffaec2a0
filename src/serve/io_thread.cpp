#include "serve/io_thread.h"

#include <boost/asio/post.hpp>

#include "base/log.h"

namespace mm {

IoThread::IoThread()
    : io(1), inbox(std::make_shared<Inbox>(io, [this] { drain(); })), work_(io.get_executor()), timer_(io) {
  tick();
  thread_ = std::thread([this] {
    for (;;) {
      try {
        io.run();
        return;
      } catch (const std::exception& e) {  // out of memory in one connection's handler: the others go on
        log_error("a connection failed: {}", e.what());
      }
    }
  });
}

IoThread::~IoThread() { stop(); }

void IoThread::stop() {
  if (!thread_.joinable()) return;
  inbox->close();
  boost::asio::post(io, [this] {
    const auto all = connections;
    for (const auto& c : all) c->drop();
    timer_.cancel();
    io.stop();
  });
  thread_.join();
  connections.clear();
}

void IoThread::tick() {
  timer_.expires_after(std::chrono::milliseconds(200));
  timer_.async_wait([this](const boost::system::error_code& error) {
    if (error) return;
    const auto now = std::chrono::steady_clock::now();
    const auto all = connections;  // a tick may end some
    for (const auto& c : all) c->tick(now);
    tick();
  });
}

void IoThread::drain() {
  items_.clear();
  items_ = inbox->take(std::move(items_));
  for (auto& item : items_) {
    item.exchange->take(item.prompt, std::move(item.event));
    if (touched_.empty() || touched_.back() != item.exchange) touched_.push_back(std::move(item.exchange));
  }
  items_.clear();
  for (const auto& exchange : touched_)  // once a connection's events are all in: one write
    if (Connection* owner = exchange->owner()) owner->pump();
  touched_.clear();
}

}  // namespace mm
