#include "base/json.h"

#include "base/error.h"
#include "base/fs.h"

namespace mm {

template <class Json>
static Json parse_checked(std::string_view text, const std::string& where) {
  constexpr int max_depth = 128;
  // The depth is checked before the parse: a parser callback would cost a call for every value.
  int depth = 0;
  bool in_string = false, escaped = false;
  for (const char c : text) {
    if (in_string) {
      if (escaped) escaped = false;
      else if (c == '\\') escaped = true;
      else if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > max_depth)
        throw Error(where, fmt::format("JSON nested at most {} deep", max_depth), "deeper nesting");
    } else if (c == ']' || c == '}') {
      depth--;
    }
  }
  try {
    return Json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    std::string reason = e.what();  // "[json.exception...] parse error at line 1, column 8: ... last read: <text>"
    reason.erase(0, reason.find("] ") == std::string::npos ? 0 : reason.find("] ") + 2);
    if (reason.size() > 200) reason = reason.substr(0, 200) + "...";
    throw Error(where, "valid JSON in UTF-8", reason);
  }
}

ordered_json parse_json(std::string_view text, const std::string& where) {
  return parse_checked<ordered_json>(text, where);
}

json parse_large_json(std::string_view text, const std::string& where) { return parse_checked<json>(text, where); }

ordered_json load_json(const std::string& path) { return parse_json(read_file(path), path); }

std::string json_type_name(const ordered_json& v) {
  if (v.is_null()) return "null";
  if (v.is_boolean()) return "true or false";
  if (v.is_number()) return "a number";
  if (v.is_string()) return "a string";
  if (v.is_array()) return "a list";
  return "an object";
}

}  // namespace mm
