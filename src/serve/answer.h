// What goes back for one request: engine events in, server-sent events or one JSON body out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "engine/request.h"
#include "serve/api_request.h"

namespace mm {

// One thread at a time. Texts are appended to `out`: when the call streams, whole events ("data: {...}\n\n").
class Answer {
 public:
  virtual ~Answer() = default;
  // An event of request `prompt` of the call; its finish is one of stop, length. ApiError where the call asks for what
  // this model does not give.
  virtual void event(size_t prompt, EngineEvent&& event, std::string& out) = 0;
  // After the last event: the rest of the stream with "data: [DONE]", or the body.
  virtual void finish(std::string& out) = 0;
};

struct AnswerHead {
  std::string id;  // "chatcmpl-..."
  int64_t created = 0;
  std::string fingerprint;
};

// The call and the context must outlive the answer.
std::unique_ptr<Answer> make_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head);
std::unique_ptr<Answer> make_chat_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head);
std::unique_ptr<Answer> make_completion_answer(const ApiCall& call, const ApiContext& context, const AnswerHead& head);
std::unique_ptr<Answer> make_embedding_answer(const ApiCall& call, const AnswerHead& head);

// The error in a stream whose head has gone out, and its end.
void append_stream_error(const ApiError& error, std::string& out);

}  // namespace mm
