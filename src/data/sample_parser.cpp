// JSON lines to samples. simdjson validates the whole row, UTF-8 included.
#include <simdjson.h>

#include "base/error.h"
#include "data/jsonl.h"
#include "data/samples.h"

namespace mm {

namespace dom = simdjson::dom;

const char* kind_name(SampleKind kind) {
  switch (kind) {
    case SampleKind::pretrain: return "pretrain";
    case SampleKind::chat: return "chat";
    case SampleKind::preference: return "preference";
    case SampleKind::prompt: return "prompt";
  }
  return "?";
}

namespace {

const char* type_name(dom::element e) {
  switch (e.type()) {
    case dom::element_type::ARRAY: return "a list";
    case dom::element_type::OBJECT: return "an object";
    case dom::element_type::STRING: return "a string";
    case dom::element_type::BOOL: return "true or false";
    case dom::element_type::NULL_VALUE: return "null";
    default: return "a number";
  }
}

ordered_json convert(dom::element e, const std::string& where, int depth) {
  if (depth > 64) throw Error(where, "JSON nested at most 64 deep", "deeper nesting");
  switch (e.type()) {
    case dom::element_type::ARRAY: {
      ordered_json out = ordered_json::array();
      for (dom::element item : dom::array(e)) out.push_back(convert(item, where, depth + 1));
      return out;
    }
    case dom::element_type::OBJECT: {
      ordered_json out = ordered_json::object();
      for (auto [key, value] : dom::object(e)) out[std::string(key)] = convert(value, where, depth + 1);
      return out;
    }
    case dom::element_type::STRING: return std::string(std::string_view(e));
    case dom::element_type::BOOL: return bool(e);
    case dom::element_type::INT64: return int64_t(e);
    case dom::element_type::UINT64: return uint64_t(e);
    case dom::element_type::DOUBLE: return double(e);
    case dom::element_type::NULL_VALUE: return nullptr;
  }
  return nullptr;
}

// Null and "" mean "no such field", as in MiniMind's files that pass through a table with all columns.
bool blank(dom::element e) {
  std::string_view text;
  return e.is_null() || (e.get(text) == simdjson::SUCCESS && text.empty());
}

// A value that MiniMind keeps as a JSON string, or the value itself.
ordered_json parsed(dom::element e, const std::string& where) {
  std::string_view text;
  if (e.get(text) == simdjson::SUCCESS) return parse_json(text, where);
  return convert(e, where, 0);
}

struct Conversation {
  ordered_json messages = ordered_json::array();
  ordered_json tools;
  bool has_tools = false;
};

Conversation read_conversation(dom::element field, const char* name) {
  dom::array list;
  if (field.get(list) != simdjson::SUCCESS)
    throw Error(fmt::format("field \"{}\"", name), "a list of messages", type_name(field));
  Conversation out;
  for (dom::element item : list) {
    const std::string where = fmt::format("{}[{}]", name, out.messages.size());
    dom::object object;
    if (item.get(object) != simdjson::SUCCESS) throw Error(where, "a message object", type_name(item));
    ordered_json message = ordered_json::object();
    for (auto [key, value] : object) {
      if (key == "role" || key == "content" || key == "reasoning_content") {
        message[std::string(key)] = convert(value, where, 0);
      } else if (key == "tool_calls" && !blank(value)) {
        message["tool_calls"] = parsed(value, where + ".tool_calls");
      }
    }
    dom::element tools;
    if (object["tools"].get(tools) == simdjson::SUCCESS && !blank(tools)) {
      ordered_json value = parsed(tools, where + ".tools");
      // Python's truth values, which MiniMind asks: the string "[]" counts as given, an empty list does not.
      if (tools.is_string() || !value.empty()) {
        out.has_tools = true;
        if (message.value("role", ordered_json()) == "system") out.tools = std::move(value);
      }
    }
    out.messages.push_back(std::move(message));
  }
  if (out.messages.empty()) throw Error(fmt::format("field \"{}\"", name), "at least one message", "none");
  return out;
}

bool is_empty(const ordered_json& message, const char* key) {
  const auto it = message.find(key);
  return it == message.end() || it->is_null() || it->empty() ||
         (it->is_string() && it->get_ref<const std::string&>().empty());
}

// A chat to learn from has an assistant that says something, every time.
void require_answers(const ordered_json& messages, const char* name) {
  bool any = false;
  for (size_t i = 0; i < messages.size(); i++) {
    const ordered_json& m = messages[i];
    if (m.value("role", ordered_json()) != "assistant") continue;
    any = true;
    if (is_empty(m, "content") && is_empty(m, "tool_calls") && is_empty(m, "reasoning_content")) {
      throw Error(fmt::format("{}[{}]", name, i), "an assistant message with content, reasoning or tool calls",
                  "an empty one");
    }
  }
  if (!any) throw Error(fmt::format("field \"{}\"", name), "a message of the assistant", "none");
}

}  // namespace

struct SampleParser::Impl {
  dom::parser parser;

  dom::object object(std::string_view line) {
    dom::element root;
    const auto error = parser.parse(line.data(), line.size()).get(root);
    if (error == simdjson::UTF8_ERROR) throw Error("row", "valid UTF-8", "invalid bytes");
    if (error != simdjson::SUCCESS)
      throw Error("row", "one JSON object", fmt::format("bad JSON ({})", simdjson::error_message(error)));
    dom::object out;
    if (root.get(out) != simdjson::SUCCESS) throw Error("row", "a JSON object", type_name(root));
    return out;
  }
};

SampleParser::SampleParser() : impl_(std::make_unique<Impl>()) {}
SampleParser::~SampleParser() = default;

static dom::element require(dom::object object, const char* name) {
  dom::element e;
  if (object[name].get(e) != simdjson::SUCCESS) {
    std::string found;
    for (auto field : object) found += (found.empty() ? "\"" : ", \"") + std::string(field.key) + "\"";
    throw Error("row", fmt::format("field \"{}\"", name), found.empty() ? "no fields" : found);
  }
  return e;
}

Sample SampleParser::parse(std::string_view line, SampleKind kind) try {
  const dom::object row = impl_->object(line);
  Sample s;
  s.kind = kind;
  if (kind == SampleKind::pretrain) {
    const dom::element text = require(row, "text");
    std::string_view t;
    if (text.get(t) != simdjson::SUCCESS) throw Error("field \"text\"", "a string", type_name(text));
    if (t.find_first_not_of(" \t\r\n") == std::string_view::npos)
      throw Error("field \"text\"", "text", "an empty string");
    s.text = t;
    return s;
  }
  if (kind == SampleKind::preference) {
    s.messages = read_conversation(require(row, "chosen"), "chosen").messages;
    s.rejected = read_conversation(require(row, "rejected"), "rejected").messages;
    require_answers(s.messages, "chosen");
    require_answers(s.rejected, "rejected");
    return s;
  }
  Conversation c = read_conversation(require(row, "conversations"), "conversations");
  if (kind == SampleKind::chat) {
    require_answers(c.messages, "conversations");
  } else {
    if (c.messages.size() < 2 || c.messages.back().value("role", ordered_json()) != "assistant") {
      throw Error("field \"conversations\"", "a question and an assistant message to fill in", "another form");
    }
    dom::element answer;
    if (row["answer"].get(answer) != simdjson::SUCCESS && row["gt"].get(answer) != simdjson::SUCCESS)
      require(row, "answer");
    if (answer.is_null()) throw Error("field \"answer\"", "a string", "null");
    s.answer = answer.is_string() ? std::string(std::string_view(answer)) : simdjson::minify(answer);
  }
  s.messages = std::move(c.messages);
  s.tools = std::move(c.tools);
  s.has_tools = c.has_tools;
  return s;
} catch (const simdjson::simdjson_error& e) {
  throw Error("row", "one JSON object", e.what());
}

std::optional<SampleKind> SampleParser::detect(std::string_view line) {
  dom::element root;
  dom::object row;
  if (impl_->parser.parse(line.data(), line.size()).get(root) != simdjson::SUCCESS ||
      root.get(row) != simdjson::SUCCESS)
    return {};
  const auto has = [&](const char* name) { return row[name].error() == simdjson::SUCCESS; };
  if (has("conversations")) return has("answer") || has("gt") ? SampleKind::prompt : SampleKind::chat;
  if (has("chosen") && has("rejected")) return SampleKind::preference;
  if (has("text")) return SampleKind::pretrain;
  std::string found;
  for (auto field : row) found += (found.empty() ? "\"" : ", \"") + std::string(field.key) + "\"";
  throw Error("row", "fields \"text\", \"conversations\", or \"chosen\" and \"rejected\"",
              found.empty() ? "no fields" : found);
}

SampleKind detect_kind(const std::string& path) {
  JsonlReader reader(path);
  JsonlChunk chunk;
  SampleParser parser;
  std::optional<SampleKind> kind;
  int64_t rows = 0;
  if (reader.next(chunk)) {
    for_each_line(chunk, [&](int64_t number, std::string_view line) {
      rows++;
      if (kind) return;
      try {
        kind = parser.detect(line);
      } catch (const Error& e) {
        throw Error(fmt::format("{}:{}: {}", path, number, e.what()));
      }
    });
  }
  if (rows == 0) throw Error(path, "rows", "an empty file");
  if (!kind)
    throw Error(path, "one JSON object a line", fmt::format("none in the first {} lines", rows),
                "is it a .jsonl file?");
  return *kind;
}

}  // namespace mm
