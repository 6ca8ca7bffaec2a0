// POST /v1/chat/completions: messages, tools and formats to a prompt and a grammar.
#include <fmt/format.h>

#include "base/error.h"
#include "serve/request_parts.h"
#include "text/chat_template.h"

namespace mm {

namespace {

constexpr size_t kMaxMessages = 4096, kMaxTools = 128;

// A message's content as one string: OpenAI also takes a list of text parts.
void join_parts(ordered_json& content, const std::string& path) {
  if (!content.is_array()) return;
  std::string text;
  for (size_t i = 0; i < content.size(); i++) {
    Fields part(content[i], fmt::format("{}[{}]", path, i));
    const auto type = part.string("type", 64);
    if (!type || (*type != "text" && *type != "refusal"))
      throw invalid_value(part.path("type"), "this model reads text alone; only parts of type text are supported.");
    const auto words = part.string(*type, SIZE_MAX);
    if (!words) throw missing(part.path(*type));
    text += *words;
  }
  content = std::move(text);
}

// The messages as the template takes them.
ordered_json template_messages(Fields& fields) {
  const ordered_json* given = fields.list("messages", kMaxMessages);
  if (given == nullptr) throw missing("messages");
  if (given->empty()) {
    throw ApiError(400, "empty_array", "messages",
                   "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array.");
  }
  ordered_json messages = *given;
  for (size_t i = 0; i < messages.size(); i++) {
    ordered_json& m = messages[i];
    const std::string here = fmt::format("messages[{}]", i);
    Fields message(m, here);
    const auto role = message.string("role", 64);
    if (!role) throw missing(here + ".role");
    const bool developer = *role == "developer";
    if (!developer && !is_chat_role(*role)) {
      throw invalid_value(
          here + ".role",
          fmt::format("system, developer, user, assistant or tool are expected, but got '{}' instead.", *role));
    }
    message.refuse({"audio", "function_call"});
    const bool plain = *role != "assistant" || message.find("tool_calls") == nullptr;
    const ordered_json* content = message.find("content");
    if (content == nullptr && plain && message.find("refusal") == nullptr &&
        message.find("reasoning_content") == nullptr)
      throw missing(here + ".content");
    if (content != nullptr && !content->is_string() && !content->is_array())
      throw invalid_type(here + ".content", "a string or an array of text parts", *content);
    if (m.contains("content")) join_parts(m["content"], here + ".content");
    if (developer) m["role"] = "system";
  }
  return messages;
}

struct Tools {
  ordered_json list;  // as the template shows them; empty when there are none or they must not be used
  std::shared_ptr<const Grammar> forced;
};

std::string tool_name(const ordered_json& tool, const std::string& path) {
  Fields fields(tool, path);
  const auto type = fields.string("type", 64);
  if (!type) throw missing(path + ".type");
  if (*type != "function") throw invalid_value(path + ".type", "only tools of type function are supported.");
  const ordered_json* function = fields.object("function");
  if (function == nullptr) throw missing(path + ".function");
  Fields inner(*function, path + ".function");
  const auto name = inner.string("name", 256);
  if (!name || name->empty()) throw missing(path + ".function.name");
  for (const char c : *name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_' && c != '-' && c != '.')
      throw invalid_value(path + ".function.name", "letters, digits, '_', '-' and '.' are expected.");
  }
  inner.string("description", SIZE_MAX);
  inner.object("parameters");
  return *name;
}

// One call in the model's own form, its arguments held to the tool's schema.
std::shared_ptr<const Grammar> call_grammar(const ordered_json& tool, const std::string& path) {
  const ordered_json& function = tool["function"];
  const auto parameters = function.find("parameters");
  const bool any = parameters == function.end() || parameters->is_null() || parameters->empty();
  return Grammar::sequence({
      Grammar::literal(
          fmt::format("<tool_call>\n{{\"name\": \"{}\", \"arguments\": ", function["name"].get<std::string>())),
      any ? Grammar::json_object() : Grammar::json_schema(*parameters, path + ".function.parameters"),
      Grammar::literal("}\n</tool_call>"),
  });
}

std::shared_ptr<const Grammar> one_call_of(const ordered_json& tools) {
  std::vector<std::shared_ptr<const Grammar>> calls;
  for (size_t i = 0; i < tools.size(); i++) calls.push_back(call_grammar(tools[i], fmt::format("tools[{}]", i)));
  return calls.size() == 1 ? calls[0] : Grammar::alternatives(calls);
}

Tools read_tools(Fields& fields) {
  const ordered_json* list = fields.list("tools", kMaxTools);
  const ordered_json* choice = fields.find("tool_choice");
  Tools tools;
  if (list == nullptr || list->empty()) {
    const bool harmless = choice == nullptr || *choice == "none" || *choice == "auto";
    if (!harmless) throw invalid_value("tool_choice", "it is only allowed when tools are given.");
    return tools;
  }
  std::vector<std::string> names;
  for (size_t i = 0; i < list->size(); i++) names.push_back(tool_name((*list)[i], fmt::format("tools[{}]", i)));
  if (choice == nullptr || *choice == "auto") {
    tools.list = *list;
  } else if (*choice == "required") {
    tools.list = *list;
    tools.forced = one_call_of(*list);
  } else if (choice->is_object()) {
    Fields named(*choice, "tool_choice");
    const auto type = named.string("type", 64);
    if (!type || *type != "function") throw invalid_value("tool_choice.type", "\"function\" is expected.");
    const ordered_json* function = named.object("function");
    if (function == nullptr) throw missing("tool_choice.function");
    const auto name = Fields(*function, "tool_choice.function").string("name", 256);
    if (!name) throw missing("tool_choice.function.name");
    for (size_t i = 0; i < names.size() && tools.forced == nullptr; i++)
      if (names[i] == *name) tools.forced = call_grammar((*list)[i], fmt::format("tools[{}]", i));
    if (tools.forced == nullptr)
      throw invalid_value("tool_choice.function.name", fmt::format("no tool is named '{}'.", *name));
    tools.list = *list;
  } else if (*choice != "none") {
    throw invalid_value("tool_choice", "none, auto, required or a function are expected.");
  }
  return tools;
}

bool wants_thinking(Fields& fields) {
  bool thinking = fields.boolean("open_thinking", false);
  if (const ordered_json* kwargs = fields.object("chat_template_kwargs")) {
    Fields inner(*kwargs, "chat_template_kwargs");
    thinking = inner.boolean("open_thinking", false) || inner.boolean("enable_thinking", false) || thinking;
    inner.done();
  }
  return thinking;
}

void logprob_fields(Fields& fields, ApiCall& call, EngineRequest& request) {
  call.logprobs = fields.boolean("logprobs", false);
  const auto top = fields.integer("top_logprobs", 0, 20);
  if (top && *top > 0 && !call.logprobs) throw invalid_value("top_logprobs", "it needs \"logprobs\": true.");
  call.top_logprobs = static_cast<int>(top.value_or(0));
  if (call.logprobs) request.logprobs = call.top_logprobs;
}

std::string render(const ordered_json& messages, const ordered_json& tools, bool thinking, const ApiContext& context) {
  std::string text;
  try {
    text = render_chat(messages, tools, {.add_generation_prompt = true, .open_thinking = thinking});
  } catch (const Error& e) {
    throw bad_value(e.what(), "messages");
  }
  if (!context.keep_empty_think) {
    static constexpr std::string_view empty = "<think>\n\n</think>\n\n";
    for (size_t at = 0; (at = text.find(empty, at)) != std::string::npos;) text.erase(at, empty.size());
  }
  return text;
}

}  // namespace

ApiCall parse_chat_request(std::string_view body, const ApiContext& context) {
  const ordered_json content = parse_body(body);
  Fields fields(content, "");
  ApiCall call;
  call.kind = ApiCall::Kind::chat;
  call.model = model_name(fields, context);
  stream_fields(fields, call);
  EngineRequest request = generation_fields(fields, context, call);
  logprob_fields(fields, call, request);
  const auto tokens = fields.integer("max_completion_tokens", 1, INT32_MAX);
  const auto old_tokens = fields.integer("max_tokens", 1, INT32_MAX);
  request.max_new_tokens = tokens ? *tokens : old_tokens ? *old_tokens : context.context;
  const ordered_json messages = template_messages(fields);
  call.thinking = wants_thinking(fields);

  const bool parallel = fields.boolean("parallel_tool_calls", true);
  try {
    const Tools tools = read_tools(fields);
    std::shared_ptr<const Grammar> format = format_grammar(fields);
    fields.refuse({"audio", "web_search_options", "functions", "function_call", "store", "suffix", "echo", "best_of",
                   "use_beam_search", "min_tokens", "prompt_logprobs"});
    if (const ordered_json* modalities = fields.list("modalities", 8);
        modalities != nullptr && *modalities != ordered_json::array({"text"}))
      throw invalid_value("modalities", "only [\"text\"] is supported.");
    fields.ignore({"metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                   "reasoning_effort", "verbosity", "prediction"});
    fields.done();

    call.tools = !tools.list.empty();
    call.forced_call = tools.forced != nullptr;
    // With both a format and tools to choose from, either a call or the format.
    request.grammar = tools.forced != nullptr           ? tools.forced
                      : format != nullptr && call.tools ? Grammar::alternatives({format, one_call_of(tools.list)})
                                                        : format;
    call.split_think = request.grammar == nullptr || call.thinking;
    if (request.grammar != nullptr && call.thinking)
      request.grammar = Grammar::sequence({Grammar::regex("[^<]*"), Grammar::literal("</think>\n\n"), request.grammar});
    // The tag itself is not given out; a call without it is complete all the same.
    if (call.tools && !parallel && request.grammar == nullptr) request.stop_strings.emplace_back("</tool_call>");
    request.prompt = encode_prompt(render(messages, tools.list, call.thinking, context), context, "messages");
  } catch (const Error& e) {
    throw bad_value(e.what(), "tools");
  }
  call.requests.push_back(std::move(request));
  return call;
}

}  // namespace mm
