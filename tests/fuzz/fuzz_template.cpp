// Hostile conversations, as a line {"messages", "tools"} of JSON: rendered or an Error.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "text/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto line = mm::parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    const auto messages = mm::json_get<mm::ordered_json>(line, "messages", "fuzz");
    const auto tools = mm::json_get_or(line, "tools", mm::ordered_json(), "fuzz");
    for (const bool think : {false, true}) {
      const std::string text = mm::render_chat(messages, tools, {true, think});
      if (!text.ends_with(think ? "<think>\n" : "</think>\n\n")) std::abort();
    }
  } catch (const mm::Error&) {
  }
  return 0;
}
