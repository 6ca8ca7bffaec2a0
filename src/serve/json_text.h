// JSON written by hand where it is written often.
#pragma once

#include <string>
#include <string_view>

namespace mm {

// Appends `text` as a JSON string without its quotes. What is not UTF-8 becomes U+FFFD, so the result always is.
void append_json_escaped(std::string_view text, std::string& out);
void append_json_string(std::string_view text, std::string& out);  // with quotes
void append_json_number(double value, std::string& out);           // shortest form that reads back; null if not finite
std::string to_utf8(std::string_view bytes);                       // invalid bytes become U+FFFD

}  // namespace mm
