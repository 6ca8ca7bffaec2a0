#include "serve/fields.h"

#include <fmt/format.h>

#include <cmath>

namespace mm {

ApiError invalid_type(const std::string& param, std::string_view expected, const ordered_json& found) {
  return {
      400, "invalid_type", param,
      fmt::format("Invalid type for '{}': expected {}, but got {} instead.", param, expected, json_type_name(found))};
}

ApiError invalid_value(const std::string& param, const std::string& message) {
  return {400, "invalid_value", param, fmt::format("Invalid value for '{}': {}", param, message)};
}

ApiError missing(const std::string& param) {
  return {400, "missing_required_parameter", param, fmt::format("Missing required parameter: '{}'.", param)};
}

Fields::Fields(const ordered_json& object, std::string path) : object_(object), path_(std::move(path)) {
  if (!object.is_object()) {
    if (path_.empty()) throw ApiError(400, "invalid_type", "", "The body must be a JSON object.");
    throw invalid_type(path_, "an object", object);
  }
  known_.resize(object.size());
}

std::string Fields::path(std::string_view name) const {
  return path_.empty() ? std::string(name) : fmt::format("{}.{}", path_, name);
}

const ordered_json* Fields::find(std::string_view name) {
  size_t i = 0;
  for (auto it = object_.begin(); it != object_.end(); ++it, i++) {
    if (it.key() != name) continue;
    known_[i] = 1;
    return it->is_null() ? nullptr : &*it;
  }
  return nullptr;
}

bool Fields::boolean(std::string_view name, bool otherwise) {
  const ordered_json* v = find(name);
  if (v == nullptr) return otherwise;
  if (!v->is_boolean()) throw invalid_type(path(name), "a boolean", *v);
  return v->get<bool>();
}

std::optional<int64_t> Fields::integer(std::string_view name, int64_t low, int64_t high) {
  const ordered_json* v = find(name);
  if (v == nullptr) return {};
  // Some clients send 5.0 for 5, and digits that 64 bits do not hold are read as a real number.
  const bool real = v->is_number_float();
  if (!v->is_number() || (real && v->get<double>() != std::trunc(v->get<double>())))
    throw invalid_type(path(name), "an integer", *v);
  constexpr double limit = 0x1p63;
  const bool under = real && v->get<double>() < -limit;
  const bool over =
      real ? v->get<double>() >= limit : v->is_number_unsigned() && v->get<uint64_t>() > uint64_t{INT64_MAX};
  const int64_t value = under ? INT64_MIN : over ? INT64_MAX : v->get<int64_t>();
  const bool below = under || value < low;
  if (below || over || value > high) {
    throw ApiError(
        400, below ? "integer_below_min_value" : "integer_above_max_value", path(name),
        fmt::format("Invalid '{}': integer {} value. Expected a value {} {}, but got {} instead.", path(name),
                    below ? "below minimum" : "above maximum", below ? ">=" : "<=", below ? low : high, v->dump()));
  }
  return value;
}

std::optional<double> Fields::number(std::string_view name, double low, double high) {
  const ordered_json* v = find(name);
  if (v == nullptr) return {};
  if (!v->is_number()) throw invalid_type(path(name), "a number", *v);
  const auto value = v->get<double>();
  if (!(value >= low && value <= high)) {
    const bool below = value < low;
    throw ApiError(
        400, below ? "decimal_below_min_value" : "decimal_above_max_value", path(name),
        fmt::format("Invalid '{}': decimal {} value. Expected a value {} {}, but got {} instead.", path(name),
                    below ? "below minimum" : "above maximum", below ? ">=" : "<=", below ? low : high, v->dump()));
  }
  return value;
}

std::optional<std::string> Fields::string(std::string_view name, size_t max_bytes) {
  const ordered_json* v = find(name);
  if (v == nullptr) return {};
  if (!v->is_string()) throw invalid_type(path(name), "a string", *v);
  const auto& text = v->get_ref<const std::string&>();
  if (text.size() > max_bytes) {
    throw ApiError(400, "string_above_max_length", path(name),
                   fmt::format("Invalid '{}': string too long. Expected at most {} bytes, but got {} instead.",
                               path(name), max_bytes, text.size()));
  }
  return text;
}

const ordered_json* Fields::list(std::string_view name, size_t max_items) {
  const ordered_json* v = find(name);
  if (v == nullptr) return nullptr;
  if (!v->is_array()) throw invalid_type(path(name), "an array", *v);
  if (v->size() > max_items) {
    throw ApiError(400, "array_above_max_length", path(name),
                   fmt::format("Invalid '{}': array too long. Expected at most {} items, but got {} instead.",
                               path(name), max_items, v->size()));
  }
  return v;
}

const ordered_json* Fields::object(std::string_view name) {
  const ordered_json* v = find(name);
  if (v != nullptr && !v->is_object()) throw invalid_type(path(name), "an object", *v);
  return v;
}

void Fields::ignore(std::initializer_list<std::string_view> names) {
  for (const auto name : names) find(name);
}

void Fields::refuse(std::initializer_list<std::string_view> names) {
  for (const auto name : names) {
    const ordered_json* v = find(name);
    if (v == nullptr) continue;
    const bool nothing = (v->is_structured() && v->empty()) || (v->is_boolean() && !v->get<bool>()) ||
                         (v->is_number() && v->get<double>() == 0) ||
                         (v->is_string() && v->get_ref<const std::string&>().empty());
    if (!nothing) {
      throw ApiError(400, "unsupported_parameter", path(name),
                     fmt::format("Unsupported parameter: '{}' is not supported by this server.", path(name)));
    }
  }
}

void Fields::done() const {
  size_t i = 0;
  for (auto it = object_.begin(); it != object_.end(); ++it, i++) {
    if (known_[i] == 0) {
      throw ApiError(400, "unknown_parameter", path(std::string_view(it.key()).substr(0, 100)),
                     fmt::format("Unknown parameter: '{}'.", path(std::string_view(it.key()).substr(0, 100))));
    }
  }
}

}  // namespace mm
