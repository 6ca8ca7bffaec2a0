#include "serve/answer.h"

#include <gtest/gtest.h>

#include "serve/test_tokenizer.h"

namespace mm {
namespace {

const ApiContext& context() {
  static const ApiContext c = [] {
    ApiContext made(test_tokenizer());
    made.context = 256;
    made.names = {"tiny"};
    made.stop_ids = {made.tokenizer.eos_id()};
    return made;
  }();
  return c;
}

// The events that an engine would make of `text`, one a token; the stop id at the end of those that stop.
std::vector<EngineEvent> events_of(const std::string& text, int choice, bool logprobs, FinishReason finish) {
  std::vector<EngineEvent> events;
  std::vector<int32_t> ids = context().tokenizer.encode(text);
  for (const int32_t id : ids) {
    EngineEvent e;
    e.choice = choice;
    e.ids = {id};
    e.text = std::string(context().tokenizer.token_bytes(id));
    if (logprobs) {
      e.logprobs = {-0.5f};
      e.top = {{{id, -0.5f}, {7, -1.5f}}};
    }
    events.push_back(std::move(e));
  }
  EngineEvent last;
  last.choice = choice;
  if (finish == FinishReason::stop) last.ids = {context().tokenizer.eos_id()};
  if (logprobs && !last.ids.empty()) {
    last.logprobs = {-0.25f};
    last.top = {{{last.ids[0], -0.25f}}};
  }
  last.finished = true;
  last.finish = finish;
  last.prompt_tokens = 11;
  last.cached_tokens = 4;
  last.completion_tokens = static_cast<int64_t>(ids.size()) + 1;
  events.push_back(std::move(last));
  return events;
}

std::string run(const ApiCall& call, const std::vector<std::string>& texts, FinishReason finish = FinishReason::stop) {
  const auto answer = make_answer(call, context(), {"chatcmpl-1", 5, "fp_x"});
  std::string out;
  for (size_t i = 0; i < texts.size(); i++) {
    const size_t n = static_cast<size_t>(call.n);
    for (auto& e : events_of(texts[i], static_cast<int>(i % n), call.logprobs, finish))
      answer->event(i / n, std::move(e), out);
  }
  answer->finish(out);
  return out;
}

std::vector<ordered_json> sse(const std::string& out) {
  std::vector<ordered_json> chunks;
  size_t at = 0;
  bool done = false;
  while (at < out.size()) {
    EXPECT_FALSE(done);
    const size_t end = out.find("\n\n", at);
    EXPECT_NE(end, std::string::npos);
    const std::string event = out.substr(at, end - at);
    EXPECT_TRUE(event.starts_with("data: ") && event.find('\n') == std::string::npos) << event;
    at = end + 2;
    if (event == "data: [DONE]") done = true;
    else chunks.push_back(ordered_json::parse(event.substr(6)));
  }
  EXPECT_TRUE(done);
  return chunks;
}

// The message that a client puts together from a stream.
ordered_json assembled(const std::vector<ordered_json>& chunks, int index) {
  ordered_json m{{"role", ""},    {"content", ""},    {"reasoning", ""}, {"calls", ordered_json::array()},
                 {"logprobs", 0}, {"finish", nullptr}};
  for (const auto& c : chunks) {
    for (const auto& choice : c["choices"]) {
      if (choice["index"] != index) continue;
      EXPECT_TRUE(m["finish"].is_null()) << "a chunk behind the finish";
      const auto& d = choice["delta"];
      if (d.contains("role")) m["role"] = m["role"].get<std::string>() + d["role"].get<std::string>();
      if (d.contains("content") && d["content"].is_string())
        m["content"] = m["content"].get<std::string>() + d["content"].get<std::string>();
      if (d.contains("reasoning_content"))
        m["reasoning"] = m["reasoning"].get<std::string>() + d["reasoning_content"].get<std::string>();
      if (d.contains("tool_calls")) {
        for (const auto& t : d["tool_calls"]) {
          const size_t k = t["index"].get<size_t>();
          if (t.contains("id"))
            m["calls"].push_back({{"id", t["id"]}, {"name", t["function"]["name"]}, {"arguments", ""}});
          auto& arguments = m["calls"].at(k)["arguments"];
          arguments = arguments.get<std::string>() + t["function"]["arguments"].get<std::string>();
        }
      }
      if (choice["logprobs"].is_object())
        m["logprobs"] = m["logprobs"].get<size_t>() + choice["logprobs"]["content"].size();
      m["finish"] = choice["finish_reason"];
    }
  }
  return m;
}

ApiCall chat_call() {
  ApiCall call;
  call.model = "ti\"ny";
  call.requests.resize(1);
  call.requests[0].stop_ids = context().stop_ids;
  return call;
}

TEST(Answer, StreamAndWholeSayTheSame) {
  struct Case {
    const char* text;
    bool thinking, tools;
  };
  for (const Case& c :
       {Case{"hello world 你好\n\"quoted\"", false, false}, Case{"I think\n</think>\n\nhello", true, false},
        Case{"<think>a</think>b", false, false}, Case{"never ends", true, true}, Case{"", false, false},
        Case{"see <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"你\"}}\n</tool_call>\n<tool_call>{\"name\": "
             "\"g\", \"arguments\": {}}</tool_call>",
             false, true},
        Case{"plan</think>\n\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>", true, true}}) {
    for (const bool logprobs : {false, true}) {
      ApiCall call = chat_call();
      call.n = 2;
      call.thinking = c.thinking;
      call.tools = c.tools;
      call.logprobs = logprobs;
      call.top_logprobs = logprobs ? 2 : 0;
      const ordered_json whole = ordered_json::parse(run(call, {c.text, "two"}));
      call.stream = call.include_usage = true;
      const auto chunks = sse(run(call, {c.text, "two"}));
      EXPECT_EQ(whole["model"], "ti\"ny");
      EXPECT_EQ(whole["object"], "chat.completion");
      for (int i = 0; i < 2; i++) {
        const ordered_json m = assembled(chunks, i);
        const auto& choice = whole["choices"][static_cast<size_t>(i)];
        const auto& message = choice["message"];
        EXPECT_EQ(m["role"], "assistant");
        EXPECT_EQ(m["content"], message["content"].is_null() ? ordered_json("") : message["content"]) << c.text;
        EXPECT_EQ(m["reasoning"],
                  message.contains("reasoning_content") ? message["reasoning_content"] : ordered_json(""))
            << c.text;
        EXPECT_EQ(m["finish"], choice["finish_reason"]);
        const size_t n_call = message.contains("tool_calls") ? message["tool_calls"].size() : 0;
        ASSERT_EQ(m["calls"].size(), n_call) << c.text;
        EXPECT_EQ(m["finish"], n_call > 0 ? "tool_calls" : "stop");
        for (size_t k = 0; k < n_call; k++) {
          EXPECT_EQ(m["calls"][k]["id"], message["tool_calls"][k]["id"]);
          EXPECT_EQ(m["calls"][k]["name"], message["tool_calls"][k]["function"]["name"]);
          EXPECT_EQ(m["calls"][k]["arguments"], message["tool_calls"][k]["function"]["arguments"]);
        }
        const size_t n_token = context().tokenizer.encode(i == 0 ? c.text : "two").size();
        if (logprobs) {
          EXPECT_EQ(choice["logprobs"]["content"].size(), n_token) << c.text;
          EXPECT_EQ(m["logprobs"], n_token) << c.text;
        } else {
          EXPECT_TRUE(choice["logprobs"].is_null());
        }
      }
      EXPECT_EQ(chunks.back()["usage"], whole["usage"]);
      EXPECT_EQ(whole["usage"]["prompt_tokens"], 11);
      EXPECT_EQ(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
      EXPECT_TRUE(chunks.front()["usage"].is_null());
    }
  }
}

// At every length: no markup as content, and the stream joined says what the whole answer says.
TEST(Answer, ACallThatMaxTokensCuts) {
  const std::string text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"你\"}}\n</tool_call>";
  const std::string arguments = "{\"x\": \"你\"}";
  const size_t name_end = text.find(", "), entered = text.find('\n');
  for (size_t n = 0; n <= text.size(); n++) {
    if (n < text.size() && (static_cast<unsigned char>(text[n]) & 0xC0) == 0x80) continue;  // inside a character
    for (const bool forced : {true, false}) {
      if (!forced && n < entered) continue;  // may still be text
      ApiCall call = chat_call();
      call.tools = true;
      call.forced_call = forced;
      call.split_think = !forced;
      const auto choice = ordered_json::parse(run(call, {text.substr(0, n)}, FinishReason::length))["choices"][0];
      call.stream = true;
      const ordered_json m = assembled(sse(run(call, {text.substr(0, n)}, FinishReason::length)), 0);
      EXPECT_EQ(choice["finish_reason"], "length");
      EXPECT_EQ(m["finish"], "length");
      EXPECT_EQ(m["content"], "") << n;
      const auto& message = choice["message"];
      EXPECT_TRUE(message["content"].is_null() || message["content"] == "") << message;
      ASSERT_EQ(message.contains("tool_calls"), n >= name_end) << text.substr(0, n);
      ASSERT_EQ(m["calls"].size(), n >= name_end ? 1u : 0u) << text.substr(0, n);
      if (n < name_end) continue;
      const auto& function = message["tool_calls"][0]["function"];
      EXPECT_EQ(function["name"], "f");
      EXPECT_TRUE(arguments.starts_with(function["arguments"].get<std::string>())) << function;
      EXPECT_EQ(m["calls"][0]["name"], function["name"]);
      EXPECT_EQ(m["calls"][0]["arguments"], function["arguments"]);
    }
  }
}

TEST(Answer, ReasoningTokensAreCounted) {
  ApiCall call = chat_call();
  call.thinking = true;
  const auto usage = ordered_json::parse(run(call, {"ab</think>c"}))["usage"];
  EXPECT_EQ(usage["completion_tokens_details"]["reasoning_tokens"], context().tokenizer.encode("ab").size() + 1);
}

TEST(Answer, Completions) {
  ApiCall call = chat_call();
  call.kind = ApiCall::Kind::completion;
  call.requests.resize(2, call.requests[0]);
  call.echo = {"one: ", "two: "};
  const auto whole = ordered_json::parse(run(call, {"hello", "world"}));
  ASSERT_EQ(whole["choices"].size(), 2u);
  EXPECT_EQ(whole["choices"][0]["text"], "one: hello");
  EXPECT_EQ(whole["choices"][1]["text"], "two: world");
  EXPECT_EQ(whole["usage"]["prompt_tokens"], 22);
  call.stream = true;
  std::string texts[2];
  for (const auto& c : sse(run(call, {"hello", "world"}))) {
    const auto& choice = c["choices"][0];
    texts[choice["index"].get<size_t>()] += choice["text"].get<std::string>();
  }
  EXPECT_EQ(texts[0], "one: hello");
  EXPECT_EQ(texts[1], "two: world");

  call.stream = false;
  call.echo.clear();
  call.logprobs = true;
  const auto lp = ordered_json::parse(run(call, {"a你", "b"}))["choices"][0]["logprobs"];
  const size_t n = context().tokenizer.encode("a你").size();
  for (const char* key : {"tokens", "token_logprobs", "top_logprobs", "text_offset"})
    EXPECT_EQ(lp[key].size(), n) << key;
  EXPECT_EQ(lp["tokens"][0], "a");
  EXPECT_EQ(lp["text_offset"][1], 1);
}

TEST(Answer, Embeddings) {
  ApiCall call;
  call.kind = ApiCall::Kind::embedding;
  call.requests.resize(1);
  const auto answer_to = [&] {
    const auto answer = make_answer(call, context(), {});
    EngineEvent e;
    e.finished = true;
    e.prompt_tokens = 3;
    e.embedding = {0.5f, -2.0f};
    std::string out;
    answer->event(0, std::move(e), out);
    answer->finish(out);
    return ordered_json::parse(out);
  };
  EXPECT_EQ(answer_to()["data"][0]["embedding"], ordered_json::array({0.5, -2.0}));
  EXPECT_EQ(answer_to()["usage"], (ordered_json{{"prompt_tokens", 3}, {"total_tokens", 3}}));
  call.base64 = true;
  EXPECT_EQ(answer_to()["data"][0]["embedding"], "AAAAPwAAAMA=");
  call.dimensions = 2;
  EXPECT_EQ(answer_to()["data"].size(), 1u);
  call.dimensions = 3;
  try {
    answer_to();
    ADD_FAILURE() << "accepted";
  } catch (const ApiError& e) {
    EXPECT_EQ(e.param, "dimensions");
    EXPECT_EQ(e.message,
              "Invalid value for 'dimensions': this model's embeddings have 2 dimensions, but got 3 instead.");
  }
}

}  // namespace
}  // namespace mm
