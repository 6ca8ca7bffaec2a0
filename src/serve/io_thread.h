// A thread that serves some of the connections, and its clock.
#pragma once

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <memory>
#include <thread>
#include <unordered_set>
#include <vector>

#include "serve/exchange.h"

namespace mm {

// A connection as its thread sees it; all members are called there.
class Connection {
 public:
  virtual ~Connection() = default;
  virtual void pump() = 0;  // its exchange has got something
  virtual void tick(std::chrono::steady_clock::time_point now) = 0;
  virtual void drop() = 0;  // at once
};

class IoThread {
 public:
  IoThread();
  ~IoThread();
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;
  void stop();  // drops the connections, ends the thread

  boost::asio::io_context io;
  const std::shared_ptr<Inbox> inbox;
  std::unordered_set<std::shared_ptr<Connection>> connections;  // that live here

 private:
  void tick();
  void drain();

  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  boost::asio::steady_timer timer_;
  std::vector<Inbox::Item> items_;
  std::vector<std::shared_ptr<Exchange>> touched_;
  std::thread thread_;
};

}  // namespace mm
