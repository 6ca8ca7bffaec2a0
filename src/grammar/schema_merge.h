// Two JSON schemas as one that demands both: what allOf, keywords beside $ref, and keywords beside anyOf mean.
#pragma once

#include <string>
#include <string_view>

#include "base/json.h"

namespace mm::grammar {

inline constexpr size_t kMaxProperties = 1000;  // of one object

// Keywords that say nothing about values: title, description, $defs ...
bool is_annotation(std::string_view keyword);
// path + "." + key, shortened and without control characters, for messages.
std::string child_path(const std::string& path, std::string_view key);

// Neither may hold $ref or allOf at its top. Error naming `path` and the keyword where the two cannot be combined
// simply.
ordered_json merge_schemas(const ordered_json& a, const ordered_json& b, const std::string& path);

}  // namespace mm::grammar
