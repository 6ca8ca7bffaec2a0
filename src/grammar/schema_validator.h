// A small validator of JSON schemas, written from the specification and independent of the compiler: for tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <regex>
#include <string>

#include "base/json.h"

namespace mm {

class SchemaValidator {
 public:
  explicit SchemaValidator(const ordered_json& root) : root_(root) {}

  bool valid(const ordered_json& v) const { return valid(v, root_); }

 private:
  bool valid(const ordered_json& v, const ordered_json& s) const {
    if (s.is_boolean()) return s.get<bool>();
    for (const auto& [key, arg] : s.items())
      if (!holds(v, s, key, arg)) return false;
    return true;
  }

  static int64_t length(const std::string& text) {
    return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
  }

  static bool is_type(const ordered_json& v, const std::string& type) {
    if (type == "integer") return v.is_number() && v.get<double>() == std::floor(v.get<double>());
    if (type == "number") return v.is_number();
    if (type == "null") return v.is_null();
    if (type == "boolean") return v.is_boolean();
    if (type == "string") return v.is_string();
    if (type == "array") return v.is_array();
    return type == "object" && v.is_object();
  }

  static bool has_format(const std::string& text, const std::string& format) {
    static const std::string clock = "([01]\\d|2[0-3]):[0-5]\\d";
    if (format == "date" || format == "date-time") {
      int y = 0, m = 0, d = 0;
      if (std::sscanf(text.c_str(), "%4d-%2d-%2d", &y, &m, &d) != 3 || m < 1 || m > 12 || d < 1) return false;
      const bool leap = y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
      const int days[] = {31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
      if (d > days[m - 1]) return false;
      const std::string time = format == "date" ? "" : "T" + clock + ":[0-5]\\d(\\.\\d+)?(Z|[+-]" + clock + ")";
      return std::regex_match(text, std::regex("\\d{4}-\\d\\d-\\d\\d" + time));
    }
    if (format == "time") return std::regex_match(text, std::regex(clock + ":[0-5]\\d(\\.\\d+)?(Z|[+-]" + clock + ")"));
    if (format == "uuid")
      return std::regex_match(text, std::regex("[\\da-fA-F]{8}(-[\\da-fA-F]{4}){3}-[\\da-fA-F]{12}"));
    if (format == "email") return std::regex_match(text, std::regex("[\\w.+-]+@[A-Za-z\\d-]+(\\.[A-Za-z\\d-]+)+"));
    if (format == "ipv4") {
      int p[4];
      char rest = 0;
      return std::sscanf(text.c_str(), "%d.%d.%d.%d%c", p, p + 1, p + 2, p + 3, &rest) == 4 &&
             std::all_of(p, p + 4, [](int b) { return b >= 0 && b <= 255; });
    }
    if (format == "ipv6") {
      const auto parts = std::count(text.begin(), text.end(), ':');
      return parts <= 8 && (parts == 7 || text.find("::") != std::string::npos) &&
             text.find_first_not_of("0123456789abcdefABCDEF:") == std::string::npos &&
             text.find(":::") == std::string::npos;
    }
    if (format == "hostname") return std::regex_match(text, std::regex("[A-Za-z\\d]([A-Za-z\\d.-]*[A-Za-z\\d])?"));
    if (format == "duration") return text.size() > 1 && text[0] == 'P' && text.back() != 'T';
    return format == "uri" && std::regex_match(text, std::regex("[A-Za-z][A-Za-z\\d+.-]*://[^ \"\\\\]+"));
  }

  bool holds(const ordered_json& v, const ordered_json& s, const std::string& key, const ordered_json& arg) const {
    if (key == "type") {
      if (arg.is_string()) return is_type(v, arg);
      return std::any_of(arg.begin(), arg.end(), [&](const ordered_json& t) { return is_type(v, t); });
    }
    if (key == "enum") return std::any_of(arg.begin(), arg.end(), [&](const ordered_json& e) { return same(v, e); });
    if (key == "const") return same(v, arg);
    if (key == "anyOf" || key == "oneOf")
      return std::any_of(arg.begin(), arg.end(), [&](const ordered_json& branch) { return valid(v, branch); });
    if (key == "allOf")
      return std::all_of(arg.begin(), arg.end(), [&](const ordered_json& branch) { return valid(v, branch); });
    if (key == "$ref") return valid(v, root_.at(ordered_json::json_pointer(arg.get<std::string>().substr(1))));
    if (v.is_number()) {
      const double x = v.get<double>(), bound = arg.is_number() ? arg.get<double>() : 0;
      if (key == "minimum") return x >= bound;
      if (key == "maximum") return x <= bound;
      if (key == "exclusiveMinimum") return x > bound;
      if (key == "exclusiveMaximum") return x < bound;
    }
    if (v.is_string()) {
      const auto text = v.get<std::string>();
      if (key == "minLength") return length(text) >= arg.get<int64_t>();
      if (key == "maxLength") return length(text) <= arg.get<int64_t>();
      if (key == "pattern") return std::regex_search(text, std::regex(arg.get<std::string>()));
      if (key == "format") return has_format(text, arg);
    }
    if (v.is_array()) {
      const size_t n_first = s.contains("prefixItems") ? s["prefixItems"].size() : 0;
      if (key == "minItems") return v.size() >= arg.get<size_t>();
      if (key == "maxItems") return v.size() <= arg.get<size_t>();
      for (size_t i = 0; i < v.size(); i++) {
        if (key == "prefixItems" && i < n_first && !valid(v[i], arg[i])) return false;
        if (key == "items" && i >= n_first && !valid(v[i], arg)) return false;
      }
    }
    if (v.is_object()) {
      if (key == "required")
        return std::all_of(arg.begin(), arg.end(),
                           [&](const ordered_json& name) { return v.contains(name.get<std::string>()); });
      for (const auto& [name, value] : v.items()) {
        const bool listed = s.contains("properties") && s["properties"].contains(name);
        if (key == "properties" && listed && !valid(value, arg[name])) return false;
        if (key == "additionalProperties" && !listed && !valid(value, arg)) return false;
      }
    }
    return true;
  }

  // Objects are equal in any order.
  static bool same(const ordered_json& a, const ordered_json& b) { return json(a) == json(b); }

  const ordered_json& root_;
};

}  // namespace mm
