// The fields of a JSON object of a request: typed, with limits, none overlooked.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "serve/api_error.h"

namespace mm {

// Every getter marks its field as known; null counts as absent. A wrong type or value is an ApiError of status 400
// whose param is the path of the field. The object must outlive this.
class Fields {
 public:
  Fields(const ordered_json& object, std::string path);  // path "": the body

  const ordered_json* find(std::string_view name);  // nullptr when absent
  bool boolean(std::string_view name, bool otherwise);
  std::optional<int64_t> integer(std::string_view name, int64_t low, int64_t high);
  std::optional<double> number(std::string_view name, double low, double high);
  std::optional<std::string> string(std::string_view name, size_t max_bytes);
  const ordered_json* list(std::string_view name, size_t max_items);
  const ordered_json* object(std::string_view name);

  void ignore(std::initializer_list<std::string_view> names);  // does no harm, whatever it says
  // Not supported: only absent, null, false, 0, "", [] or {} pass.
  void refuse(std::initializer_list<std::string_view> names);
  void done() const;  // ApiError for a field that nobody asked for
  std::string path(std::string_view name) const;

 private:
  const ordered_json& object_;
  std::string path_;
  std::vector<uint8_t> known_;  // a flag a field of object_
};

ApiError invalid_type(const std::string& param, std::string_view expected, const ordered_json& found);
ApiError invalid_value(const std::string& param, const std::string& message);
ApiError missing(const std::string& param);

}  // namespace mm
