// Hostile bodies of API requests: the first byte chooses the endpoint. Each is refused with an error whose body is
// JSON, or becomes requests that fit the context. The same bytes as generated text: how it is cut must not change the
// tool calls found in it, and what is written as JSON reads back.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "base/error.h"
#include "serve/api_request.h"
#include "serve/json_text.h"
#include "serve/test_tokenizer.h"
#include "serve/tool_stream.h"

static const mm::ApiContext& context() {
  static const mm::ApiContext c = [] {
    mm::ApiContext made(mm::test_tokenizer());
    made.context = 512;
    made.names = {"tiny"};
    made.stop_ids = {2};
    return made;
  }();
  return c;
}

static void check_call(const mm::ApiCall& call) {
  if (call.requests.empty()) std::abort();
  for (const auto& r : call.requests) {
    if (r.prompt.empty() || static_cast<int64_t>(r.prompt.size()) >= context().context) std::abort();
    if (r.n < 1 || r.n > 128 || r.logprobs > 20) std::abort();
  }
}

static void check_request(int kind, std::string_view body) {
  try {
    switch (kind) {
      case 0: check_call(mm::parse_chat_request(body, context())); break;
      case 1: check_call(mm::parse_completion_request(body, context())); break;
      case 2: check_call(mm::parse_embedding_request(body, context())); break;
      case 3: mm::answer_tokenize(body, context()); break;
      default: mm::answer_detokenize(body, context());
    }
  } catch (const mm::ApiError& e) {
    if (!mm::ordered_json::parse(e.body(), nullptr, false).is_object()) std::abort();
  }
}

static std::string calls_of(std::string_view text, size_t cut, bool unfinished) {
  mm::ToolStream stream;
  std::vector<mm::ToolStream::Part> parts;
  for (size_t at = 0; at < text.size(); at += cut) stream.push(text.substr(at, cut), parts);
  stream.flush(parts, unfinished);
  std::string content, calls;
  for (const auto& p : parts) {
    if (p.kind == mm::ToolStream::Part::Kind::content) content += p.text;
    else calls += (p.kind == mm::ToolStream::Part::Kind::call ? "\x01" : "") + p.text;
  }
  return content + "\x02" + calls;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data + 1), size - 1);
  check_request(data[0] % 5, body);
  if (body.size() > 2000) return 0;
  for (const bool unfinished : {false, true}) {
    const std::string whole = calls_of(body, body.size() + 1, unfinished);
    for (const size_t cut : {1, 3, 7})
      if (calls_of(body, cut, unfinished) != whole) std::abort();
  }
  std::string json;
  mm::append_json_string(body, json);
  const auto read = mm::ordered_json::parse(json, nullptr, false);
  if (!read.is_string() || read.get<std::string>() != mm::to_utf8(body)) std::abort();
  return 0;
}
