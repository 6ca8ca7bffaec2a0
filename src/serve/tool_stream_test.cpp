#include "serve/tool_stream.h"

#include <gtest/gtest.h>

namespace mm {
namespace {

struct Result {
  std::string content;
  std::vector<std::pair<std::string, std::string>> calls;
  bool operator==(const Result&) const = default;
};

Result read(std::string_view text, size_t cut, bool unfinished) {
  ToolStream stream;
  std::vector<ToolStream::Part> parts;
  for (size_t at = 0; at < text.size(); at += cut) stream.push(text.substr(at, cut), parts);
  stream.flush(parts, unfinished);
  Result r;
  for (const auto& p : parts) {
    if (p.kind == ToolStream::Part::Kind::content) r.content += p.text;
    else if (p.kind == ToolStream::Part::Kind::call) r.calls.emplace_back(p.text, "");
    else r.calls.at(r.calls.size() - 1).second += p.text;
  }
  EXPECT_EQ(stream.n_call(), static_cast<int>(r.calls.size()));
  return r;
}

TEST(ToolStream, Table) {
  const std::pair<std::string, Result> table[] = {
      {"no call at all <tool", {"no call at all <tool", {}}},
      {" leading and trailing \n", {" leading and trailing \n", {}}},
      {"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"\", \"b\": [1, {}]}}\n</tool_call>",
       {"", {{"f", "{\"a\": \"}\\\"\", \"b\": [1, {}]}"}}}},
      {"Let me see.\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"name\": \"g\", "
       "\"arguments\": {\"x\": 1}}\n</tool_call>\n",
       {"Let me see.", {{"f", "{}"}, {"g", "{\"x\": 1}"}}}},
      {"<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n and then more", {"and then more", {{"f", "{}"}}}},
      // Another order, arguments in a string, none at all: read when complete
      {"<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}</tool_call>", {"", {{"f", "{\"a\":1}"}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>", {"", {{"f", "{\"a\": 1}"}}}},
      {"<tool_call>{\"name\": \"f\"}</tool_call>", {"", {{"f", "{}"}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>", {"", {{"f", "{}"}}}},
      {"<tool_call>{\"name\": \"\\u4f60\", \"arguments\": {}}</tool_call>", {"", {{"你", "{}"}}}},
      // What is no call is text
      {"<tool_call>nonsense</tool_call>", {"<tool_call>nonsense</tool_call>", {}}},
      {"<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>!",
       {"<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>!", {}}},
      {"<tool_call>{\"name\": ", {"<tool_call>{\"name\": ", {}}},
      {"<tool_call>", {"<tool_call>", {}}},
      // Cut short: the closing tag alone is missing, or the arguments are not complete
      {"<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n", {"", {{"f", "{\"a\": 1}"}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": ", {"", {{"f", "{\"a\": "}}}},
      {"<tool_call>{\"arguments\": {}, \"name\": \"f\"}", {"", {{"f", "{}"}}}},
  };
  for (const auto& [text, expected] : table) {
    for (size_t cut = 1; cut <= text.size(); cut++) {
      const Result r = read(text, cut, false);
      EXPECT_EQ(r.content, expected.content) << text << " in pieces of " << cut;
      EXPECT_EQ(r.calls, expected.calls) << text << " in pieces of " << cut;
    }
  }
}

// Cut by a limit inside a call: what is known of it, and no markup.
TEST(ToolStream, Unfinished) {
  const std::pair<std::string, Result> table[] = {
      {"no call at all <tool", {"no call at all <tool", {}}},
      {"Let me see.\n<tool_call>", {"Let me see.", {}}},
      {"<tool_call>\n", {"", {}}},
      {"<tool_call>\n{\"na", {"", {}}},
      {"<tool_call>\n{\"name\": \"weath", {"", {}}},
      {"<tool_call>\n{\"name\": \"f\"", {"", {{"f", ""}}}},
      {"<tool_call>\n{\"name\": \"f\", \"arg", {"", {{"f", ""}}}},
      {"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [", {"", {{"f", "{\"a\": ["}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n<tool_call>{\"name\": \"g\"",
       {"", {{"f", "{}"}, {"g", ""}}}},
      // Arguments in a string, also where an escape is cut
      {"<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1", {"", {{"f", "{\"a\": 1"}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": \\ud83d\\ude", {"", {{"f", "{\"a\": "}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"", {"", {{"f", "{}"}}}},
      {"<tool_call>{\"name\": \"f\", \"arguments\": \"", {"", {{"f", ""}}}},
      // Another order: no name yet
      {"<tool_call>{\"arguments\": {\"a\": 1}, \"na", {"", {}}},
      // What cannot become a call is text
      {"<tool_call>nonsense", {"<tool_call>nonsense", {}}},
      {"<tool_call>{\"name\": 5, ", {"<tool_call>{\"name\": 5, ", {}}},
  };
  for (const auto& [text, expected] : table) {
    for (size_t cut = 1; cut <= text.size(); cut++) {
      const Result r = read(text, cut, true);
      EXPECT_EQ(r.content, expected.content) << text << " in pieces of " << cut;
      EXPECT_EQ(r.calls, expected.calls) << text << " in pieces of " << cut;
    }
  }
}

TEST(ToolStream, ArgumentsComeBeforeTheCallIsComplete) {
  ToolStream stream;
  std::vector<ToolStream::Part> parts;
  stream.push("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Par", parts);
  ASSERT_EQ(parts.size(), 2u);
  EXPECT_EQ(parts[0].text, "f");
  EXPECT_EQ(parts[1].text, "{\"city\": \"Par");
}

}  // namespace
}  // namespace mm
