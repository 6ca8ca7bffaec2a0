// Templates of json.h.
#pragma once

#include <type_traits>

#include "base/error.h"

namespace mm {

template <class T>
bool json_holds(const ordered_json& v) {
  if constexpr (std::is_same_v<T, bool>) return v.is_boolean();
  else if constexpr (std::is_integral_v<T>) return v.is_number_integer();
  else if constexpr (std::is_floating_point_v<T>) return v.is_number();
  else if constexpr (std::is_same_v<T, std::string>) return v.is_string();
  else return true;
}

template <class T>
const char* json_wanted() {
  if constexpr (std::is_same_v<T, bool>) return "true or false";
  else if constexpr (std::is_integral_v<T>) return "an integer";
  else if constexpr (std::is_floating_point_v<T>) return "a number";
  else if constexpr (std::is_same_v<T, std::string>) return "a string";
  else return "a value";
}

template <class T>
T json_get(const ordered_json& object, const char* key, const std::string& where) {
  if (!object.is_object()) throw Error(where, "a JSON object", json_type_name(object));
  const auto it = object.find(key);
  if (it == object.end()) throw Error(where, fmt::format("field \"{}\"", key), "none");
  if (!json_holds<T>(*it))
    throw Error(fmt::format("{}: field \"{}\"", where, key), json_wanted<T>(), json_type_name(*it));
  return it->template get<T>();
}

template <class T>
T json_get_or(const ordered_json& object, const char* key, T fallback, const std::string& where) {
  if (!object.is_object()) throw Error(where, "a JSON object", json_type_name(object));
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  return json_get<T>(object, key, where);
}

}  // namespace mm
