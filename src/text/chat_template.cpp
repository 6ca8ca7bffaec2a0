#include "text/chat_template.h"

#include <optional>

#include "base/error.h"

namespace mm {

namespace {

const char* const kToolsHead =
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>";
const char* const kToolsTail =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n"
    "</tool_call><|im_end|>\n";

// What Python takes for false: the template tests `if tools`, `if message.tool_calls`, `if tool_call.function`.
bool is_falsy(const ordered_json& v) {
  if (v.is_null()) return true;
  if (v.is_boolean()) return !v.get<bool>();
  if (v.is_number()) return v.get<double>() == 0;
  if (v.is_string()) return v.get_ref<const std::string&>().empty();
  return v.empty();
}

const ordered_json* field(const ordered_json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}

std::string_view strip_left(std::string_view s) {
  while (s.starts_with('\n')) s.remove_prefix(1);
  return s;
}
std::string_view strip_right(std::string_view s) {
  while (s.ends_with('\n')) s.remove_suffix(1);
  return s;
}

enum class Role { system, user, assistant, tool };

std::optional<Role> role_from_name(std::string_view name) {
  if (name == "system") return Role::system;
  if (name == "user") return Role::user;
  if (name == "assistant") return Role::assistant;
  if (name == "tool") return Role::tool;
  return {};
}

class Renderer {
 public:
  Renderer(const ordered_json& messages, const std::string& where) : messages_(messages), where_(where) {
    if (!messages.is_array()) throw Error(where, "a list of messages", json_type_name(messages));
    if (messages.empty()) throw Error(where, "at least one message", "none");
    roles_.reserve(messages.size());
    for (size_t i = 0; i < messages.size(); i++) roles_.push_back(role(i));
  }

  std::string render(const ordered_json& tools, const ChatOptions& options) {
    head(tools);
    for (size_t i = 0; i < messages_.size(); i++) message(i);
    if (options.add_generation_prompt) {
      out_ += "<|im_start|>assistant\n";
      out_ += options.open_thinking ? "<think>\n" : "<think>\n\n</think>\n\n";
    }
    return std::move(out_);
  }

 private:
  std::string at(size_t i) const { return fmt::format("{}[{}]", where_, i); }
  std::string at(size_t i, const char* key) const { return fmt::format("{}[{}].{}", where_, i, key); }

  Role role(size_t i) const {
    const ordered_json& m = messages_[i];
    if (!m.is_object()) throw Error(at(i), "an object with role and content", json_type_name(m));
    const ordered_json* r = field(m, "role");
    if (r == nullptr) throw Error(at(i), "field \"role\"", "none");
    if (!r->is_string()) throw Error(at(i, "role"), "a string", json_type_name(*r));
    const auto& name = r->get_ref<const std::string&>();
    if (const auto known = role_from_name(name)) return *known;
    throw Error(at(i, "role"), "system, user, assistant or tool", "\"" + name + "\"");
  }

  // A string field; "" for null or absent.
  std::string_view text(size_t i, const char* key) const {
    const ordered_json* v = field(messages_[i], key);
    if (v == nullptr || v->is_null()) return {};
    if (!v->is_string()) throw Error(at(i, key), "a string or null", json_type_name(*v));
    return v->get_ref<const std::string&>();
  }

  bool has_text(size_t i, const char* key) const {
    const ordered_json* v = field(messages_[i], key);
    return v != nullptr && v->is_string();
  }

  void head(const ordered_json& tools) {
    const bool system = roles_[0] == Role::system;
    if (system && !has_text(0, "content")) {
      const ordered_json* v = field(messages_[0], "content");
      throw Error(at(0, "content"), "a string (the system prompt)", v == nullptr ? "none" : json_type_name(*v));
    }
    if (is_falsy(tools)) {
      if (system) block("system", text(0, "content"));
      return;
    }
    if (!tools.is_array()) throw Error("tools", "a list of objects", json_type_name(tools));
    out_ += "<|im_start|>system\n";
    if (system) {
      out_ += text(0, "content");
      out_ += "\n\n";
    }
    out_ += kToolsHead;
    for (size_t i = 0; i < tools.size(); i++) {
      if (!tools[i].is_object()) throw Error(fmt::format("tools[{}]", i), "an object", json_type_name(tools[i]));
      out_ += '\n';
      append_python_json(tools[i], out_);
    }
    out_ += kToolsTail;
  }

  void block(const char* role_name, std::string_view content) {
    out_ += "<|im_start|>";
    out_ += role_name;
    out_ += '\n';
    out_ += content;
    out_ += "<|im_end|>\n";
  }

  void message(size_t i) {
    switch (roles_[i]) {
      case Role::system:
        if (i > 0) block("system", text(i, "content"));  // the first one is part of the head
        break;
      case Role::user: block("user", text(i, "content")); break;
      case Role::assistant: assistant(i); break;
      case Role::tool:
        if (i == 0 || roles_[i - 1] != Role::tool) out_ += "<|im_start|>user";
        out_ += "\n<tool_response>\n";
        out_ += text(i, "content");
        out_ += "\n</tool_response>";
        if (i + 1 == messages_.size() || roles_[i + 1] != Role::tool) out_ += "<|im_end|>\n";
        break;
    }
  }

  void assistant(size_t i) {
    constexpr std::string_view open = "<think>", close = "</think>";
    std::string_view content = text(i, "content"), reasoning = text(i, "reasoning_content");
    if (!has_text(i, "reasoning_content")) {
      const size_t first = content.find(close);
      if (first != std::string_view::npos) {
        reasoning = strip_right(content.substr(0, first));
        const size_t begin = reasoning.rfind(open);
        if (begin != std::string_view::npos) reasoning.remove_prefix(begin + open.size());
        content = strip_left(content.substr(content.rfind(close) + close.size()));
      }
    }
    out_ += "<|im_start|>assistant\n<think>\n";
    out_ += strip_right(strip_left(reasoning));
    out_ += "\n</think>\n\n";
    out_ += strip_left(content);
    tool_calls(i, !content.empty());
    out_ += "<|im_end|>\n";
  }

  void tool_calls(size_t i, bool after_content) {
    const ordered_json* calls = field(messages_[i], "tool_calls");
    if (calls == nullptr || is_falsy(*calls)) return;
    if (!calls->is_array()) throw Error(at(i, "tool_calls"), "a list", json_type_name(*calls));
    for (size_t k = 0; k < calls->size(); k++) {
      std::string here = fmt::format("{}[{}]", at(i, "tool_calls"), k);
      const ordered_json* call = &(*calls)[k];
      if (!call->is_object()) throw Error(here, "an object with name and arguments", json_type_name(*call));
      const ordered_json* function = field(*call, "function");
      if (function != nullptr && !is_falsy(*function)) {
        call = function;
        here += ".function";
        if (!call->is_object()) throw Error(here, "an object with name and arguments", json_type_name(*call));
      }
      const ordered_json *name = field(*call, "name"), *arguments = field(*call, "arguments");
      if (name == nullptr) throw Error(here, "field \"name\"", "none");
      if (!name->is_string()) throw Error(here + ".name", "a string", json_type_name(*name));
      if (arguments == nullptr) throw Error(here, "field \"arguments\"", "none");
      if (k > 0 || after_content) out_ += '\n';
      out_ += "<tool_call>\n{\"name\": \"";
      out_ += name->get_ref<const std::string&>();
      out_ += "\", \"arguments\": ";
      if (arguments->is_string()) out_ += arguments->get_ref<const std::string&>();
      else append_python_json(*arguments, out_);
      out_ += "}\n</tool_call>";
    }
  }

  const ordered_json& messages_;
  const std::string& where_;
  std::vector<Role> roles_;
  std::string out_;
};

}  // namespace

bool is_chat_role(std::string_view name) { return role_from_name(name).has_value(); }

std::string render_chat(const ordered_json& messages, const ordered_json& tools, const ChatOptions& options,
                        const std::string& where) {
  return Renderer(messages, where).render(tools, options);
}

}  // namespace mm
