#include "serve/exchange.h"

#include <fmt/format.h>

#include <boost/asio/post.hpp>
#include <cmath>
#include <ctime>
#include <random>

#include "base/error.h"
#include "base/log.h"

namespace mm {

void Inbox::deliver(Item&& item) {
  const std::lock_guard lock(mutex_);
  if (io_ == nullptr) return;
  items_.push_back(std::move(item));
  if (woken_) return;
  woken_ = true;
  boost::asio::post(*io_, wake_);
}

std::vector<Inbox::Item> Inbox::take(std::vector<Item>&& empty) {
  const std::lock_guard lock(mutex_);
  woken_ = false;
  std::swap(items_, empty);
  return std::move(empty);
}

void Inbox::close() {
  std::vector<Item> dropped;  // outside the lock: the last reference to an exchange may be in it
  const std::lock_guard lock(mutex_);
  io_ = nullptr;
  std::swap(items_, dropped);
}

static std::string random_id(ApiCall::Kind kind) {
  thread_local std::mt19937_64 source{(uint64_t{std::random_device{}()} << 32) ^ std::random_device{}()};
  const char* prefix = kind == ApiCall::Kind::chat ? "chatcmpl" : kind == ApiCall::Kind::completion ? "cmpl" : "embd";
  return fmt::format("{}-{:016x}{:08x}", prefix, source(), static_cast<uint32_t>(source()));
}

Exchange::Exchange(const Service& service, std::shared_ptr<Inbox> inbox, ApiCall call, Connection* owner)
    : service_(service),
      inbox_(std::move(inbox)),
      call_(std::move(call)),
      head_{random_id(call_.kind), std::time(nullptr), service.fingerprint},
      answer_(make_answer(call_, service.context, head_)),
      owner_(owner),
      open_(call_.requests.size(), call_.n) {}

void Exchange::start() { submit_more(); }

void Exchange::submit_more() {
  // Of a long list of prompts only some wait in the queue at once, so it does not fill up with them.
  constexpr size_t at_once = 32;
  while (n_submitted_ < call_.requests.size() && n_submitted_ - n_finished_ < at_once && !error_) {
    try {
      if (const auto& r = call_.requests[n_submitted_]; r.max_new_tokens == 0) {
        answer_nothing(n_submitted_++);
        continue;
      }
      EngineRequest request = call_.requests[n_submitted_];
      request.sink = [self = shared_from_this(), prompt = n_submitted_](EngineEvent&& event) {
        self->inbox_->deliver({self, prompt, std::move(event)});
      };
      const Submitted submitted = service_.engine.submit(std::move(request));
      if (submitted.status == SubmitStatus::accepted) {
        ids_.push_back(submitted.id);
        n_submitted_++;
        service_.metrics.choices_submitted += call_.n;
        continue;
      }
      if (submitted.status == SubmitStatus::queue_full && n_submitted_ > n_finished_) return;  // later
      const bool full = submitted.status == SubmitStatus::queue_full;
      ApiError error = full ? ApiError(429, "rate_limit_exceeded", "", "The server is overloaded; try again later.")
                            : ApiError(503, "draining", "", "The server is shutting down.");
      error.retry_after =
          full ? std::max(1, static_cast<int>(std::ceil(std::min(submitted.retry_after_seconds, 3600.0)))) : 5;
      fail(std::move(error));
    } catch (const Error& e) {
      fail(bad_value(e.what(), ""));
    } catch (const std::exception& e) {
      log_error("a request failed: {}", e.what());
      fail({500, "internal_error", "", "The server had an error while processing your request."});
    }
  }
}

void Exchange::answer_nothing(size_t prompt) {
  service_.metrics.choices_submitted += call_.n;
  for (int choice = 0; choice < call_.n; choice++) {
    EngineEvent event;
    event.choice = choice;
    event.finished = true;
    event.finish = FinishReason::length;
    event.prompt_tokens = static_cast<int64_t>(call_.requests[prompt].prompt.size());
    inbox_->deliver({shared_from_this(), prompt, std::move(event)});
  }
}

void Exchange::take(size_t prompt, EngineEvent&& event) {
  service_.metrics.stream_events.fetch_add(1, std::memory_order_relaxed);
  if (event.finished) service_.metrics.finished(event);
  if (owner_ == nullptr || error_ || done_) return;
  if (event.finished && event.finish != FinishReason::stop && event.finish != FinishReason::length) {
    switch (event.finish) {
      case FinishReason::timeout: return fail({504, "timeout", "", "The request took longer than this server allows."});
      case FinishReason::cancelled:
        return fail({503, "cancelled", "", "The server ended the request; it is shutting down."});
      default:
        log_error("request {}: {}", head_.id, event.error);
        return fail(
            {500, "internal_error", "", "The server had an error while processing your request: " + event.error});
    }
  }
  // Many long choices with log-probabilities could fill the memory.
  constexpr size_t max_held = size_t{64} << 20, logprob_bytes = 100;
  if (!call_.stream) held_bytes_ += event.text.size();
  if (!call_.stream && call_.logprobs)
    held_bytes_ += event.ids.size() * static_cast<size_t>(1 + call_.top_logprobs) * logprob_bytes;
  if (held_bytes_ > max_held) {
    return fail(
        {400, "answer_too_large", "",
         "The answer has grown beyond 64 MB. Stream it, or ask for fewer choices, tokens or log-probabilities."});
  }
  const bool finished = event.finished;
  try {
    answer_->event(prompt, std::move(event), out_);
  } catch (const ApiError& e) {
    return fail(e);
  }
  if (!finished || --open_[prompt] > 0) return;
  n_finished_++;
  if (n_finished_ == call_.requests.size()) {
    answer_->finish(out_);
    done_ = true;
  } else {
    submit_more();
  }
}

void Exchange::fail(ApiError error) {
  error_ = std::move(error);
  cancel_all();
}

void Exchange::cancel_all() {
  for (const uint64_t id : ids_) service_.engine.cancel(id);  // those that have ended are unknown there
}

void Exchange::abandon() {
  owner_ = nullptr;
  if (!done_ && !error_) cancel_all();
}

}  // namespace mm
