// MiniMind's ChatML template, rendered natively and exactly as the Jinja source in tokenizer_config.json renders it.
#pragma once

#include <string>

#include "base/json.h"

namespace mm {

struct ChatOptions {
  bool add_generation_prompt = false;
  bool open_thinking = false;  // the generation prompt ends inside <think>
};

// messages: list of {role, content[, reasoning_content][, tool_calls]}; tools: null or a list. Key order of tools and
// arguments is kept (ordered_json). Error names the message index and field. `where` prefixes the error.
std::string render_chat(const ordered_json& messages, const ordered_json& tools, const ChatOptions& options,
                        const std::string& where = "messages");

// The Jinja source that render_chat implements; written into tokenizers that this program trains.
const std::string& minimind_chat_template();

}  // namespace mm
