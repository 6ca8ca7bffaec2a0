// One request of the API while the engine works on it.
#pragma once

#include <boost/asio/io_context.hpp>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "serve/answer.h"
#include "serve/service.h"

namespace mm {

class Connection;
class Exchange;

// Events on their way from the engine's thread to the thread of the connections: a list under a lock, and one wake-up
// for all that gathers until it is taken.
class Inbox {
 public:
  Inbox(boost::asio::io_context& io, std::function<void()> wake) : io_(&io), wake_(std::move(wake)) {}
  struct Item {
    std::shared_ptr<Exchange> exchange;
    size_t prompt;
    EngineEvent event;
  };
  void deliver(Item&& item);  // the engine's thread; does nothing once closed
  std::vector<Item> take(std::vector<Item>&& empty);
  void close();

 private:
  std::mutex mutex_;
  std::vector<Item> items_;      // under mutex_, as are the next two
  boost::asio::io_context* io_;  // null once closed
  bool woken_ = false;
  std::function<void()> wake_;
};

// All members are called on the connection's thread.
class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(const Service& service, std::shared_ptr<Inbox> inbox, ApiCall call, Connection* owner);

  void start();  // submits; what goes wrong is in error()
  void take(size_t prompt, EngineEvent&& event);
  void abandon();  // the client is gone, or does not read: cancels

  bool streams() const { return call_.stream; }
  bool done() const { return done_; }
  const std::optional<ApiError>& error() const { return error_; }  // set: nothing more will come
  std::string& out() { return out_; }                              // the answer so far; whoever sends it takes it
  Connection* owner() const { return owner_; }                     // null after abandon()
  const std::string& id() const { return head_.id; }

 private:
  void submit_more();
  void answer_nothing(size_t prompt);  // no token is wanted: the engine has nothing to do
  void fail(ApiError error);
  void cancel_all();

  const Service& service_;
  std::shared_ptr<Inbox> inbox_;
  const ApiCall call_;
  const AnswerHead head_;
  std::unique_ptr<Answer> answer_;
  std::string out_;
  std::optional<ApiError> error_;
  Connection* owner_;
  size_t n_submitted_ = 0, n_finished_ = 0;  // prompts
  size_t held_bytes_ = 0;                    // about, of an answer that goes out as a whole
  std::vector<int> open_;                    // choices of each prompt that have not ended
  std::vector<uint64_t> ids_;                // of the submitted ones
  bool done_ = false;
};

}  // namespace mm
