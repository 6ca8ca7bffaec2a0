#include "serve/api_request.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "serve/test_tokenizer.h"

namespace mm {
namespace {

const ApiContext& context() {
  static const ApiContext c = [] {
    ApiContext made(test_tokenizer());
    made.context = 1000;
    made.names = {"tiny", "alias"};
    made.stop_ids = {made.tokenizer.eos_id()};
    made.sampling.temperature = 0.5f;
    return made;
  }();
  return c;
}

using Parser = ApiCall (*)(std::string_view, const ApiContext&);

struct Bad {
  const char* body;
  const char* param;
  const char* code;
  int status = 400;
};

void check_table(Parser parse, std::initializer_list<Bad> table) {
  for (const Bad& bad : table) {
    try {
      parse(bad.body, context());
      ADD_FAILURE() << "accepted: " << bad.body;
    } catch (const ApiError& e) {
      EXPECT_EQ(e.param, bad.param) << bad.body << "\n" << e.message;
      EXPECT_EQ(e.code, bad.code) << bad.body << "\n" << e.message;
      EXPECT_EQ(e.status, bad.status) << bad.body;
      EXPECT_TRUE(ordered_json::parse(e.body(), nullptr, false).is_object()) << e.body();
    }
  }
}

// Adds fields to a chat request that is good without them.
#define CHAT(fields) R"({"messages": [{"role": "user", "content": "hi"}], )" fields "}"
#define TOOL R"({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})"

TEST(ApiRequest, BadChatRequests) {
  check_table(
      parse_chat_request,
      {
          {"", "", "invalid_json"},
          {"{", "", "invalid_json"},
          {"[]", "", "invalid_type"},
          {"\"text\"", "", "invalid_type"},
          {"{\"messages\": \"\xFF\"}", "", "invalid_json"},
          {"{}", "messages", "missing_required_parameter"},
          {R"({"messages": null})", "messages", "missing_required_parameter"},
          {R"({"messages": []})", "messages", "empty_array"},
          {R"({"messages": "hi"})", "messages", "invalid_type"},
          {R"({"messages": ["hi"]})", "messages[0]", "invalid_type"},
          {R"({"messages": [{"content": "hi"}]})", "messages[0].role", "missing_required_parameter"},
          {R"({"messages": [{"role": "robot", "content": "hi"}]})", "messages[0].role", "invalid_value"},
          {R"({"messages": [{"role": "user"}]})", "messages[0].content", "missing_required_parameter"},
          {R"({"messages": [{"role": "user", "content": 5}]})", "messages[0].content", "invalid_type"},
          {R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]})",
           "messages[0].content[0].type", "invalid_value"},
          {R"({"messages": [{"role": "user", "content": [{"type": "text"}]}]})", "messages[0].content[0].text",
           "missing_required_parameter"},
          {R"({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": 1}}]}]})",
           "messages[0].tool_calls[0].function.name", "invalid_value"},
          {CHAT(R"("model": "gpt-4")"), "model", "model_not_found", 404},
          {CHAT(R"("model": 5)"), "model", "invalid_type"},
          {CHAT(R"("temperature": "hot")"), "temperature", "invalid_type"},
          {CHAT(R"("temperature": -0.1)"), "temperature", "decimal_below_min_value"},
          {CHAT(R"("temperature": 2.1)"), "temperature", "decimal_above_max_value"},
          {CHAT(R"("top_p": 1.5)"), "top_p", "decimal_above_max_value"},
          {CHAT(R"("min_p": -1)"), "min_p", "decimal_below_min_value"},
          {CHAT(R"("top_k": 1.5)"), "top_k", "invalid_type"},
          {CHAT(R"("top_k": -2)"), "top_k", "integer_below_min_value"},
          {CHAT(R"("presence_penalty": 3)"), "presence_penalty", "decimal_above_max_value"},
          {CHAT(R"("frequency_penalty": -3)"), "frequency_penalty", "decimal_below_min_value"},
          {CHAT(R"("repetition_penalty": 0)"), "repetition_penalty", "decimal_below_min_value"},
          {CHAT(R"("n": 0)"), "n", "integer_below_min_value"},
          {CHAT(R"("n": 129)"), "n", "integer_above_max_value"},
          {CHAT(R"("n": true)"), "n", "invalid_type"},
          {CHAT(R"("seed": "x")"), "seed", "invalid_type"},
          {CHAT(R"("max_tokens": 0)"), "max_tokens", "integer_below_min_value"},
          {CHAT(R"("max_tokens": 99999999999999999999)"), "max_tokens", "integer_above_max_value"},
          {CHAT(R"("seed": 9223372036854775808)"), "seed", "integer_above_max_value"},
          {CHAT(R"("seed": 99999999999999999999999)"), "seed", "integer_above_max_value"},
          {CHAT(R"("seed": 1e30)"), "seed", "integer_above_max_value"},
          {CHAT(R"("seed": -1e30)"), "seed", "integer_below_min_value"},
          {CHAT(R"("seed": 1.5)"), "seed", "invalid_type"},
          {CHAT(R"("max_completion_tokens": -5)"), "max_completion_tokens", "integer_below_min_value"},
          {CHAT(R"("stop": "")"), "stop", "invalid_value"},
          {CHAT(R"("stop": ["a", 5])"), "stop[1]", "invalid_type"},
          {CHAT(R"("stop": 5)"), "stop", "invalid_type"},
          {CHAT(R"("stop": ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"])"), "stop",
           "array_above_max_length"},
          {CHAT(R"("logprobs": 3)"), "logprobs", "invalid_type"},
          {CHAT(R"("top_logprobs": 3)"), "top_logprobs", "invalid_value"},
          {CHAT(R"("logprobs": true, "top_logprobs": 21)"), "top_logprobs", "integer_above_max_value"},
          {CHAT(R"("logit_bias": {"x": 1})"), "logit_bias.x", "invalid_value"},
          {CHAT(R"("logit_bias": {"99999": 1})"), "logit_bias.99999", "invalid_value"},
          {CHAT(R"("logit_bias": {"5": 101})"), "logit_bias.5", "invalid_value"},
          {CHAT(R"("logit_bias": [5])"), "logit_bias", "invalid_type"},
          {CHAT(R"("stop_token_ids": [-1])"), "stop_token_ids", "invalid_value"},
          {CHAT(R"("stream": "yes")"), "stream", "invalid_type"},
          {CHAT(R"("stream_options": {"include_usage": true})"), "stream_options", "invalid_value"},
          {CHAT(R"("stream": true, "stream_options": {"usage": true})"), "stream_options.usage", "unknown_parameter"},
          {CHAT(R"("priority": 1e3)"), "priority", "integer_above_max_value"},
          {CHAT(R"("user": 7)"), "user", "invalid_type"},
          {CHAT(R"("response_format": "json")"), "response_format", "invalid_type"},
          {CHAT(R"("response_format": {})"), "response_format.type", "missing_required_parameter"},
          {CHAT(R"("response_format": {"type": "xml"})"), "response_format.type", "invalid_value"},
          {CHAT(R"("response_format": {"type": "json_schema"})"), "response_format.json_schema",
           "missing_required_parameter"},
          {CHAT(R"("response_format": {"type": "json_schema", "json_schema": {"name": "x"}})"),
           "response_format.json_schema.schema", "missing_required_parameter"},
          {CHAT(R"("response_format": {"type": "regex"})"), "response_format.pattern", "missing_required_parameter"},
          {CHAT(R"("response_format": {"type": "json_object"}, "guided_regex": "a")"), "guided_regex", "invalid_value"},
          {CHAT(R"("tools": 5)"), "tools", "invalid_type"},
          {CHAT(R"("tools": [{"type": "code_interpreter"}])"), "tools[0].type", "invalid_value"},
          {CHAT(R"("tools": [{"type": "function"}])"), "tools[0].function", "missing_required_parameter"},
          {CHAT(R"("tools": [{"type": "function", "function": {}}])"), "tools[0].function.name",
           "missing_required_parameter"},
          {CHAT(R"("tools": [{"type": "function", "function": {"name": "a b"}}])"), "tools[0].function.name",
           "invalid_value"},
          {CHAT(R"("tool_choice": "required")"), "tool_choice", "invalid_value"},
          {CHAT(R"("tools": [)" TOOL R"(], "tool_choice": "maybe")"), "tool_choice", "invalid_value"},
          {CHAT(R"("tools": [)" TOOL R"(], "tool_choice": {"type": "function", "function": {"name": "g"}})"),
           "tool_choice.function.name", "invalid_value"},
          {CHAT(R"("chat_template_kwargs": {"open_thinking": 1})"), "chat_template_kwargs.open_thinking",
           "invalid_type"},
          {CHAT(R"("functions": [{"name": "f"}])"), "functions", "unsupported_parameter"},
          {CHAT(R"("store": true)"), "store", "unsupported_parameter"},
          {CHAT(R"("modalities": ["text", "audio"])"), "modalities", "invalid_value"},
          {CHAT(R"("temprature": 1)"), "temprature", "unknown_parameter"},
      });
}

TEST(ApiRequest, BadCompletionRequests) {
  check_table(parse_completion_request,
              {
                  {"{}", "prompt", "missing_required_parameter"},
                  {R"({"prompt": 5})", "prompt", "invalid_type"},
                  {R"({"prompt": []})", "prompt", "invalid_value"},
                  {R"({"prompt": [1, "a"]})", "prompt", "invalid_type"},
                  {R"({"prompt": ["a", 1]})", "prompt[1]", "invalid_type"},
                  {R"({"prompt": [1, 999999]})", "prompt", "invalid_value"},
                  {R"({"prompt": [1, -1]})", "prompt", "invalid_type"},
                  {R"({"prompt": [[1], []]})", "prompt[1]", "invalid_value"},
                  {R"({"prompt": "a", "suffix": "b"})", "suffix", "unsupported_parameter"},
                  {R"({"prompt": "a", "best_of": 3})", "best_of", "invalid_value"},
                  {R"({"prompt": "a", "max_tokens": -1})", "max_tokens", "integer_below_min_value"},
                  {R"({"prompt": "a", "logprobs": 21})", "logprobs", "integer_above_max_value"},
                  {R"({"prompt": "a", "logprobs": 1, "echo": true})", "echo", "invalid_value"},
                  {R"({"prompt": "a", "messages": []})", "messages", "unknown_parameter"},
              });
}

TEST(ApiRequest, BadEmbeddingRequests) {
  check_table(parse_embedding_request,
              {
                  {"{}", "input", "missing_required_parameter"},
                  {R"({"input": {}})", "input", "invalid_type"},
                  {R"({"input": ""})", "input", "invalid_value"},
                  {R"({"input": ["a", ""]})", "input[1]", "invalid_value"},
                  {R"({"input": "a", "dimensions": 0})", "dimensions", "integer_below_min_value"},
                  {R"({"input": "a", "dimensions": "8"})", "dimensions", "invalid_type"},
                  {R"({"input": "a", "encoding_format": "hex"})", "encoding_format", "invalid_value"},
              });
}

TEST(ApiRequest, BadTextsToTokenize) {
  const auto tokenize = [](std::string_view body, const ApiContext& c) { return answer_tokenize(body, c), ApiCall(); };
  const auto back = [](std::string_view body, const ApiContext& c) { return answer_detokenize(body, c), ApiCall(); };
  check_table(tokenize, {
                            {"{}", "content", "missing_required_parameter"},
                            {R"({"content": 5})", "content", "invalid_type"},
                            {R"({"prompt": 5})", "prompt", "invalid_type"},
                            {R"({"messages": [{"role": "robot"}]})", "messages[0].role", "invalid_value"},
                            {R"({"content": "a", "with_pieces": "yes"})", "with_pieces", "invalid_type"},
                        });
  check_table(back, {
                        {"{}", "tokens", "missing_required_parameter"},
                        {R"({"tokens": "a"})", "tokens", "invalid_type"},
                        {R"({"tokens": [99999]})", "tokens", "invalid_value"},
                    });
}

std::string message_of(Parser parse, std::string_view body) {
  try {
    parse(body, context());
    return "accepted";
  } catch (const ApiError& e) {
    return e.message;
  }
}

TEST(ApiRequest, MessagesSayWhatIsExpected) {
  for (const char* seed : {"1e30", "99999999999999999999999", "9223372036854775808"}) {
    const std::string message =
        message_of(parse_completion_request, fmt::format(R"({{"prompt": "a", "seed": {}}})", seed));
    EXPECT_NE(message.find("<= 9223372036854775807"), std::string::npos) << message;
  }
  EXPECT_NE(message_of(parse_chat_request, R"({"messages": [{"role": "robot", "content": "hi"}]})").find("developer"),
            std::string::npos);
}

TEST(ApiRequest, WholeNumbersOf64Bits) {
  const auto seed = [](const char* text) {
    return static_cast<int64_t>(
        parse_completion_request(fmt::format(R"({{"prompt": "a", "seed": {}}})", text), context())
            .requests[0]
            .sampling.seed);
  };
  EXPECT_EQ(seed("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(seed("-9223372036854775808"), INT64_MIN);
  EXPECT_EQ(seed("5.0"), 5);
  EXPECT_EQ(seed("1e18"), 1000000000000000000);
}

TEST(ApiRequest, TooLongPromptsAreTold) {
  for (const size_t n : {size_t{1500}, size_t{200000}}) {
    const std::string text(n, 'q');
    try {
      parse_chat_request(R"({"messages": [{"role": "user", "content": ")" + text + R"("}]})", context());
      ADD_FAILURE() << n;
    } catch (const ApiError& e) {
      EXPECT_EQ(e.code, "context_length_exceeded");
      EXPECT_EQ(e.param, "messages");
    }
  }
  std::string wide = R"({"messages": [], "metadata": {)";
  for (int i = 0; i < 5000; i++) wide += fmt::format("\"k{}\":1,", i);
  wide.back() = '}';
  EXPECT_THROW(parse_chat_request(wide + "}", context()), ApiError);
}

TEST(ApiRequest, EverythingArrives) {
  const ApiCall call = parse_chat_request(
      CHAT(R"("model": "alias", "temperature": 0.25, "top_p": 0.5, "top_k": -1, "min_p": 0.125, "presence_penalty": 1,
              "frequency_penalty": -1, "repetition_penalty": 1.5, "seed": -3, "n": 2, "stop": ["a", "b"], "max_tokens": 9,
              "logit_bias": {"40": -100}, "logprobs": true, "top_logprobs": 2, "user": "me", "priority": -2,
              "stream": true, "stream_options": {"include_usage": true}, "stop_token_ids": [44],
              "metadata": {"a": "b"}, "store": false, "reasoning_effort": "medium")"),
      context());
  const EngineRequest& r = call.requests.at(0);
  EXPECT_EQ(call.model, "alias");
  EXPECT_TRUE(call.stream && call.include_usage && call.logprobs && !call.thinking && !call.tools && call.split_think);
  EXPECT_EQ(r.sampling.temperature, 0.25f);
  EXPECT_EQ(r.sampling.top_p, 0.5f);
  EXPECT_EQ(r.sampling.top_k, 0);
  EXPECT_EQ(r.sampling.min_p, 0.125f);
  EXPECT_EQ(r.sampling.presence_penalty, 1.0f);
  EXPECT_EQ(r.sampling.frequency_penalty, -1.0f);
  EXPECT_EQ(r.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(r.sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_EQ(r.n, 2);
  EXPECT_EQ(r.stop_strings, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(r.stop_ids, (std::vector<int32_t>{context().tokenizer.eos_id(), 44}));
  EXPECT_EQ(r.max_new_tokens, 9);
  EXPECT_EQ(r.logit_bias, (std::vector<std::pair<int32_t, float>>{{40, -100.0f}}));
  EXPECT_EQ(r.logprobs, 2);
  EXPECT_EQ(r.client, "me");
  EXPECT_EQ(r.priority, -2);
  EXPECT_EQ(context().tokenizer.decode(r.prompt),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
}

TEST(ApiRequest, DefaultsAndForms) {
  const ApiCall plain = parse_chat_request(R"({"messages": [{"role": "user", "content": "hi"}]})", context());
  EXPECT_EQ(plain.model, "tiny");
  EXPECT_EQ(plain.requests[0].sampling.temperature, 0.5f);
  EXPECT_EQ(plain.requests[0].max_new_tokens, 1000);
  EXPECT_NE(
      plain.requests[0].sampling.seed,
      parse_chat_request(R"({"messages": [{"role": "user", "content": "hi"}]})", context()).requests[0].sampling.seed);
  // Parts and the developer role are as one text and the system role.
  const ApiCall parts = parse_chat_request(
      R"({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]})",
      context());
  EXPECT_EQ(parts.requests[0].prompt,
            parse_chat_request(
                R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]})", context())
                .requests[0]
                .prompt);
  for (const char* form : {R"("open_thinking": true)", R"("chat_template_kwargs": {"open_thinking": true})",
                           R"("chat_template_kwargs": {"enable_thinking": true})"}) {
    const ApiCall thinking = parse_chat_request(
        std::string(R"({"messages": [{"role": "user", "content": "hi"}], )") + form + "}", context());
    EXPECT_TRUE(thinking.thinking) << form;
    EXPECT_TRUE(context().tokenizer.decode(thinking.requests[0].prompt).ends_with("<think>\n")) << form;
  }
  const ApiCall tools = parse_chat_request(CHAT(R"("tools": [)" TOOL R"(], "parallel_tool_calls": false)"), context());
  EXPECT_TRUE(tools.tools);
  EXPECT_EQ(tools.requests[0].stop_strings, std::vector<std::string>{"</tool_call>"});
  EXPECT_NE(context().tokenizer.decode(tools.requests[0].prompt).find("\"name\": \"f\""), std::string::npos);
  const ApiCall none = parse_chat_request(CHAT(R"("tools": [)" TOOL R"(], "tool_choice": "none")"), context());
  EXPECT_FALSE(none.tools);
  EXPECT_EQ(none.requests[0].prompt, plain.requests[0].prompt);
  const ApiCall forced = parse_chat_request(CHAT(R"("tools": [)" TOOL R"(], "tool_choice": "required")"), context());
  EXPECT_TRUE(forced.forced_call && !tools.forced_call);
  EXPECT_TRUE(forced.tools && forced.requests[0].grammar != nullptr && !forced.split_think);

  const ApiCall many = parse_completion_request(R"({"prompt": ["a", "b"], "n": 2, "echo": true})", context());
  EXPECT_EQ(many.requests.size(), 2u);
  EXPECT_EQ(many.requests[0].max_new_tokens, 16);
  EXPECT_EQ(many.echo, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(many.requests[0].prompt[0], context().tokenizer.bos_id());
  EXPECT_EQ(parse_completion_request(R"({"prompt": [5, 6, 7]})", context()).requests[0].prompt,
            (std::vector<int32_t>{5, 6, 7}));
  EXPECT_EQ(parse_completion_request(R"({"prompt": "a", "ignore_eos": true})", context()).requests[0].stop_ids.size(),
            0u);
  EXPECT_EQ(parse_embedding_request(R"({"input": ["a", "b", "c"]})", context()).requests.size(), 3u);
}

TEST(ApiRequest, TokenizeAndBack) {
  const auto answer =
      ordered_json::parse(answer_tokenize(R"({"content": "hello 你好", "with_pieces": true})", context()));
  EXPECT_EQ(answer["count"], answer["tokens"].size());
  EXPECT_EQ(answer["token_strs"].size(), answer["tokens"].size());
  const auto text =
      ordered_json::parse(answer_detokenize(ordered_json{{"tokens", answer["tokens"]}}.dump(), context()));
  EXPECT_EQ(text["content"], "hello 你好");
  EXPECT_THROW(answer_detokenize(R"({"tokens": [99999]})", context()), ApiError);
  EXPECT_THROW(answer_tokenize(R"({"content": 5})", context()), ApiError);
}

}  // namespace
}  // namespace mm
