#include "grammar/schema_merge.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace mm::grammar {

namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& keyword) {
  throw Error(child_path(path, keyword), "schemas that can be combined keyword by keyword",
              fmt::format("\"{}\" in two of them that differ", keyword), "write the combination as one schema");
}

// {"allOf": [a, b]}, for compilation later: both may hold anything.
ordered_json both(const ordered_json& a, const ordered_json& b) {
  if (a == b || (b.is_boolean() && b.get<bool>())) return a;
  if (a.is_boolean()) return a.get<bool>() ? b : a;
  return {{"allOf", ordered_json::array({a, b})}};
}

ordered_json common_values(const ordered_json& a, const ordered_json& b) {
  ordered_json out = ordered_json::array();
  for (const auto& value : a)
    if (std::find(b.begin(), b.end(), value) != b.end()) out.push_back(value);
  return out;
}

ordered_json common_types(const ordered_json& a, const ordered_json& b) {
  const auto list = [](const ordered_json& t) { return t.is_array() ? t : ordered_json::array({t}); };
  const ordered_json in_a = list(a), in_b = list(b);
  ordered_json out = common_values(in_a, in_b);
  const auto has = [](const ordered_json& types, const char* name) {
    return std::find(types.begin(), types.end(), name) != types.end();
  };
  for (const auto& [x, y] : {std::pair(&in_a, &in_b), std::pair(&in_b, &in_a)})
    if (has(*x, "integer") && has(*y, "number") && !has(out, "integer") && !has(out, "number"))
      out.push_back("integer");
  return out;
}

void merge_properties(ordered_json& out, const ordered_json& other, const std::string& path) {
  const auto properties_of = [](const ordered_json& s) {
    const auto it = s.find("properties");
    return it == s.end() ? ordered_json::object() : *it;
  };
  const ordered_json a = properties_of(out), b = properties_of(other);
  if (!a.is_object() || !b.is_object()) refuse(path, "properties");
  if (a.size() + b.size() > kMaxProperties)
    throw Error(child_path(path, "properties"), fmt::format("at most {} properties", kMaxProperties), "more");
  // Names that one side does not list fall under its additionalProperties.
  const auto under = [](const ordered_json& s, const ordered_json& value) {
    const auto rest = s.find("additionalProperties");
    return rest == s.end() ? value : both(value, *rest);
  };
  ordered_json merged = ordered_json::object();
  for (const auto& [name, value] : a.items()) {
    const auto it = b.find(name);
    merged[name] = it != b.end() ? both(value, *it) : under(other, value);
  }
  for (const auto& [name, value] : b.items())
    if (!a.contains(name)) merged[name] = under(out, value);
  const auto rest = other.find("additionalProperties");
  if (out.contains("properties") || other.contains("properties")) out["properties"] = merged;
  if (rest != other.end())
    out["additionalProperties"] =
        out.contains("additionalProperties") ? both(out["additionalProperties"], *rest) : *rest;
}

}  // namespace

bool is_annotation(std::string_view keyword) {
  static constexpr std::array names{"title",     "description", "default", "examples", "deprecated", "readOnly",
                                    "writeOnly", "$comment",    "$schema", "$defs",    "definitions"};
  return std::find(names.begin(), names.end(), keyword) != names.end();
}

std::string child_path(const std::string& path, std::string_view key) {
  constexpr size_t longest = 200;  // one is kept for every part of a schema
  if (path.size() > longest) return path.ends_with("...") ? path : path + "...";
  std::string shown;
  for (const char c : key) {
    if (shown.size() >= 48 && (static_cast<uint8_t>(c) & 0xC0) != 0x80) {
      shown += "...";
      break;
    }
    shown += static_cast<uint8_t>(c) < 0x20 ? '?' : c;
  }
  return path + "." + shown;
}

ordered_json merge_schemas(const ordered_json& a, const ordered_json& b, const std::string& path) {
  if (a.is_boolean()) return a.get<bool>() ? b : a;
  if (b.is_boolean()) return b.get<bool>() ? a : b;
  ordered_json out = a;
  merge_properties(out, b, path);
  for (const auto& [keyword, value] : b.items()) {
    if (is_annotation(keyword) || keyword == "properties" || keyword == "additionalProperties") continue;
    const auto it = out.find(keyword);
    if (it == out.end()) {
      out[keyword] = value;
    } else if (*it == value) {
      continue;
    } else if (keyword == "type") {
      *it = common_types(*it, value);
    } else if (keyword == "enum" && it->is_array() && value.is_array()) {
      *it = common_values(*it, value);
    } else if (keyword == "required" && it->is_array() && value.is_array()) {
      it->insert(it->end(), value.begin(), value.end());
    } else if (keyword.starts_with("min") || keyword == "exclusiveMinimum") {
      if (!it->is_number() || !value.is_number()) refuse(path, keyword);
      if (value > *it) *it = value;
    } else if (keyword.starts_with("max") || keyword == "exclusiveMaximum") {
      if (!it->is_number() || !value.is_number()) refuse(path, keyword);
      if (value < *it) *it = value;
    } else if (keyword == "items" && !out.contains("prefixItems") && !b.contains("prefixItems")) {
      *it = both(*it, value);
    } else {
      refuse(path, keyword);
    }
  }
  // What one side says of the first items and the other of all items would have to be combined item by item.
  const auto clash = [](const ordered_json& x, const ordered_json& y) {
    return x.contains("prefixItems") && !y.contains("prefixItems") && y.contains("items");
  };
  if (clash(a, b) || clash(b, a)) refuse(path, "prefixItems");
  return out;
}

}  // namespace mm::grammar
