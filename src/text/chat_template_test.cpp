#include "text/chat_template.h"

#include "text/text_test_files.h"

namespace mm {
namespace {

void check_rows(const std::string& path, size_t rows_wanted) {
  const auto rows = json_lines(path);
  EXPECT_EQ(rows.size(), rows_wanted);
  for (const ordered_json& row : rows) {
    const ChatOptions options{row["add_generation_prompt"].get<bool>(), row["open_thinking"].get<bool>()};
    ASSERT_EQ(render_chat(row["messages"], row["tools"], options), row["text"].get<std::string>()) << row.dump();
  }
}

TEST(ChatTemplateOracle, RendersAsTransformers) {
  MM_REQUIRE_SHARED();
  check_rows(kShared + "/oracle/tokenizer/chat_template.jsonl", 72);
  const ordered_json config = load_json(kShared + "/models/minimind-tokenizer/tokenizer_config.json");
  EXPECT_EQ(minimind_chat_template(), config["chat_template"].get<std::string>());
}

TEST(ChatTemplate, RendersAsTransformers) { check_rows(kGolden + "/template.jsonl", 120); }

std::string failure(const char* messages, const char* tools = "null") {
  const ordered_json m = ordered_json::parse(messages), t = ordered_json::parse(tools);
  return error_of([&] { render_chat(m, t, {}, "line 7"); });
}

TEST(ChatTemplate, ErrorsNameMessageAndField) {
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << "\"" << message << "\" lacks " << part;
  };
  expect(failure("{}"), "line 7: expected a list of messages, found an object");
  expect(failure("[]"), "at least one message");
  expect(failure(R"([1])"), "line 7[0]");
  expect(failure(R"([{"role": "user", "content": "a"}, {"content": "x"}])"), "line 7[1]: expected field \"role\"");
  expect(failure(R"([{"role": 1}])"), "line 7[0].role: expected a string, found a number");
  expect(failure(R"([{"role": "developer", "content": "x"}])"), "found \"developer\"");
  expect(failure(R"([{"role": "user", "content": ["x"]}])"), "line 7[0].content");
  expect(failure(R"([{"role": "system"}])"), "line 7[0].content");
  expect(failure(R"([{"role": "system", "content": null}])"), "line 7[0].content");
  expect(failure(R"([{"role": "assistant", "reasoning_content": 3}])"), "line 7[0].reasoning_content");
  expect(failure(R"([{"role": "assistant", "tool_calls": "x"}])"), "line 7[0].tool_calls");
  expect(failure(R"([{"role": "assistant", "tool_calls": [1]}])"), "line 7[0].tool_calls[0]");
  expect(failure(R"([{"role": "assistant", "tool_calls": [{"function": "f"}]}])"), "tool_calls[0].function");
  expect(failure(R"([{"role": "assistant", "tool_calls": [{"arguments": {}}]}])"), "field \"name\"");
  expect(failure(R"([{"role": "assistant", "tool_calls": [{"name": 1, "arguments": {}}]}])"), "tool_calls[0].name");
  expect(failure(R"([{"role": "assistant", "tool_calls": [{"name": "f"}]}])"), "field \"arguments\"");
  expect(failure(R"([{"role": "user", "content": "x"}])", R"({"a": 1})"), "tools");
  expect(failure(R"([{"role": "user", "content": "x"}])", R"(["f"])"), "tools[0]");
}

}  // namespace
}  // namespace mm
