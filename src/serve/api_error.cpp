#include "serve/api_error.h"

#include "serve/json_text.h"

namespace mm {

static std::string_view type_of(int status, std::string_view code) {
  if (status == 429) return "rate_limit_error";
  if (status >= 500 && code != "invalid_http") return "server_error";
  if (status == 401) return "authentication_error";
  return "invalid_request_error";
}

std::string ApiError::body() const {
  std::string out = R"({"error":{"message":)";
  append_json_string(message, out);
  out += R"(,"type":")";
  out += type_of(status, code);
  out += R"(","param":)";
  if (param.empty()) out += "null";
  else append_json_string(param, out);
  out += R"(,"code":)";
  if (code.empty()) out += "null";
  else append_json_string(code, out);
  out += "}}";
  return out;
}

ApiError bad_value(std::string_view message, std::string_view param) {
  // A path has no spaces and ends at the first ": "; positions in a text ("regex:3") are no part of it.
  const size_t colon = message.find(": ");
  std::string_view where = message.substr(0, std::min(colon, message.size()));
  where = where.substr(0, where.find(':'));
  const bool names = colon != std::string_view::npos && !param.empty() && where.find(' ') == std::string_view::npos;
  return {400, "invalid_value", std::string(names ? where : param), std::string(message)};
}

}  // namespace mm
