#include "lab/demo_eval.h"

#include <algorithm>

#include "base/error.h"
#include "engine/chat_session.h"
#include "lab/calculator.h"
#include "text/chat_template.h"

namespace mm {

namespace {

constexpr int64_t kMaxReply = 160;  // tokens; the longest trained reply has about 110
constexpr size_t kWrongKept = 3;

GenerateRequest greedy_request(const Tokenizer& tokenizer, const ordered_json& messages, const ordered_json& tools,
                               bool think) {
  GenerateRequest request;
  request.prompt =
      tokenizer.encode(render_chat(messages, tools, {.add_generation_prompt = true, .open_thinking = think}));
  request.sampling.greedy = true;
  request.max_new_tokens = kMaxReply;
  request.stop_ids = {tokenizer.eos_id()};
  return request;
}

std::string lower(std::string s) {
  std::transform(s.begin(), s.end(), s.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return s;
}

bool matches(const DemoQuestion& q, const std::string& reply, DemoMatch match) {
  if (match == DemoMatch::contains) return lower(reply).find(lower(q.expected)) != std::string::npos;
  const auto number = demo_last_number(reply);
  return number && std::to_string(*number) == q.expected;
}

// The expression of a reply like "<tool_call>\n{"name": "calculate", "arguments": {"expression":
// "12*34"}}\n</tool_call>", nothing if the reply is no such call.
std::optional<std::string> called_expression(const std::string& reply) {
  const std::string open = "<tool_call>", close = "</tool_call>";
  const size_t begin = reply.find(open), end = reply.find(close);
  if (begin == std::string::npos || end == std::string::npos || end < begin) return std::nullopt;
  try {
    const size_t from = begin + open.size();
    const ordered_json call = parse_json(std::string_view(reply).substr(from, end - from), "tool call");
    if (json_get<std::string>(call, "name", "tool call") != "calculate") return std::nullopt;
    return json_get<std::string>(json_get<ordered_json>(call, "arguments", "tool call"), "expression", "tool call");
  } catch (const Error&) {  // the model wrote something else
    return std::nullopt;
  }
}

}  // namespace

DemoScore score_demo(Generator& generator, const Tokenizer& tokenizer, const std::vector<DemoQuestion>& questions,
                     DemoMatch match, bool think) {
  std::vector<GenerateRequest> requests;
  requests.reserve(questions.size());
  for (const DemoQuestion& q : questions) {
    requests.push_back(
        greedy_request(tokenizer, ordered_json::array({{{"role", "user"}, {"content", q.text}}}), nullptr, think));
  }
  const std::vector<GenerateResult> results = generator.run(requests);
  DemoScore score;
  for (size_t i = 0; i < questions.size(); i++) {
    const bool right = matches(questions[i], results[i].text, match);
    score.asked++;
    score.right += right;
    if (!right && score.wrong.size() < kWrongKept) score.wrong.emplace_back(questions[i], results[i].text);
  }
  return score;
}

DemoConversation::DemoConversation(Generator& generator, Tokenizer tokenizer, bool with_calculator)
    : generator_(generator), tokenizer_(std::move(tokenizer)) {
  if (!with_calculator) return;
  tools_ = parse_json(demo_calculator_tools(), "the demo's tools");
  messages_.push_back({{"role", "system"}, {"content", "You are MiniMind."}});
}

std::vector<std::pair<std::string, std::string>> DemoConversation::ask(const std::string& question, bool think) {
  std::vector<std::pair<std::string, std::string>> parts;
  messages_.push_back({{"role", "user"}, {"content", question}});
  for (int calls = 0;; calls++) {
    const GenerateRequest request = greedy_request(tokenizer_, messages_, tools_, think);
    const AnswerParts reply = split_answer(generator_.run({&request, 1})[0].text, think);
    if (!reply.reasoning.empty()) parts.emplace_back("think", reply.reasoning);
    const auto expression = calls < 3 && !tools_.is_null() ? called_expression(reply.content) : std::nullopt;
    if (!expression) {
      parts.emplace_back("answer", reply.content);
      messages_.push_back({{"role", "assistant"}, {"content", reply.content}});
      return parts;
    }
    parts.emplace_back("call", *expression);
    messages_.push_back(
        {{"role", "assistant"},
         {"content", ""},
         {"tool_calls", ordered_json::array({{{"name", "calculate"}, {"arguments", {{"expression", *expression}}}}})}});
    const auto value = calculate(*expression);
    const ordered_json result =
        value ? ordered_json{{"result", *value}} : ordered_json{{"error", "not a valid expression"}};
    parts.emplace_back("result", result.dump());
    messages_.push_back({{"role", "tool"}, {"content", result.dump()}});
  }
}

}  // namespace mm
