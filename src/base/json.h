// JSON for configuration, tokenizer files, APIs and results (nlohmann). Data sets use simdjson (see data/).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace mm {

using json = nlohmann::json;
using ordered_json = nlohmann::ordered_json;  // keeps key order: results, templates, saved configs

// Parse with an Error that names `where` (a path, "line 12 of x.jsonl", ...). Rejects invalid UTF-8 and nesting deeper
// than 128 levels.
ordered_json parse_json(std::string_view text, const std::string& where);
ordered_json load_json(const std::string& path);
// The same checks, keys sorted: for objects of many thousand keys (vocabularies), where ordered_json's look-up is slow.
json parse_large_json(std::string_view text, const std::string& where);

// Typed field access with an Error naming field and file when it is missing or of another type.
template <class T>
T json_get(const ordered_json& object, const char* key, const std::string& where);
template <class T>
T json_get_or(const ordered_json& object, const char* key, T fallback, const std::string& where);

std::string json_type_name(const ordered_json& value);  // "a string", "a number", ...

}  // namespace mm

#include "base/json_inl.h"
