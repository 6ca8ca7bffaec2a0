// MiniMind's ChatML template, rendered natively and exactly as the Jinja source in tokenizer_config.json renders it.
#pragma once

#include <string>
#include <string_view>

#include "base/json.h"

namespace mm {

struct ChatOptions {
  bool add_generation_prompt = false;
  bool open_thinking = false;  // the generation prompt ends inside <think>
};

// messages: list of {role, content[, reasoning_content][, tool_calls]}, role one of system, user, assistant, tool.
//   content: a string; null or absent where a message may be without (renders as ""; a leading system message may not).
//   tool_calls: a list of {name, arguments} or {function: {name, arguments}}; arguments any JSON, or a string that is
//   written as it stands. null, "", [] and {} mean none, as for tools (a list of objects).
// Key order of tools and arguments is kept. Anything else is an Error that names the message's index and field, also
// where Jinja would drop the message or field in silence (unknown roles, content of another type). `where` prefixes it.
std::string render_chat(const ordered_json& messages, const ordered_json& tools, const ChatOptions& options,
                        const std::string& where = "messages");

bool is_chat_role(std::string_view name);

// Appends `value` as Python's json.dumps(value, ensure_ascii=False) writes it: what the template's `tojson` prints.
void append_python_json(const ordered_json& value, std::string& out);

// The Jinja source that render_chat implements; written into tokenizers that this program trains.
const std::string& minimind_chat_template();

}  // namespace mm
