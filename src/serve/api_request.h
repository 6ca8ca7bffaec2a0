// A request body of the OpenAI API, checked and turned into what the engine takes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "engine/request.h"
#include "serve/api_error.h"
#include "text/tokenizer.h"

namespace mm {

// What the parser must know of the server. Constant once the server runs; shared by all threads.
struct ApiContext {
  explicit ApiContext(Tokenizer t);

  Tokenizer tokenizer;
  int64_t context = 0;                        // tokens a sequence at most
  int64_t max_choices = 128;                  // n of a request
  std::vector<std::string> names;             // of the model, the first is its own; "*": any name will do
  SamplingParams sampling;                    // where a request says nothing
  std::vector<int32_t> stop_ids;              // end the answer
  bool keep_empty_think = true;               // see chat_prompt()
  double request_seconds = 0;                 // deadline of every request; 0: none
  size_t max_token_bytes = 1;                 // of the longest token: bounds what a text can be without encoding it
  int32_t think_open = -1, think_close = -1;  // <think> and </think>, -1 where they are not one token
};

struct ApiCall {
  enum class Kind { chat, completion, embedding };
  Kind kind = Kind::chat;
  std::string model;  // as the request named it
  bool stream = false, include_usage = false;
  int n = 1;
  std::vector<EngineRequest> requests;  // one a prompt; their sinks are still empty; max_new_tokens 0: see Exchange
  bool thinking = false;                // the prompt ends inside <think>
  bool split_think = true;              // <think> in the text is not content
  bool tools = false;                   // look for tool calls in the text
  bool forced_call = false;             // it is one call and nothing else
  bool logprobs = false;
  int top_logprobs = 0;
  std::vector<std::string> echo;  // completions: the prompts' texts, where they are to be repeated
  bool base64 = false;            // embeddings, as is the next
  int64_t dimensions = 0;         // that the client counts on; 0: any
};

// Error or ApiError when the body makes no sense. Any thread; takes as long as encoding the text.
ApiCall parse_chat_request(std::string_view body, const ApiContext& context);
ApiCall parse_completion_request(std::string_view body, const ApiContext& context);
ApiCall parse_embedding_request(std::string_view body, const ApiContext& context);
// The whole answers to POST /tokenize and /detokenize.
std::string answer_tokenize(std::string_view body, const ApiContext& context);
std::string answer_detokenize(std::string_view body, const ApiContext& context);

}  // namespace mm
