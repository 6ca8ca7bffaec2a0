// A request that cannot be answered, as the OpenAI API says so.
#pragma once

#include <exception>
#include <string>
#include <string_view>

namespace mm {

// status 400 unless the code says otherwise. `param` is the path of the field, "" where no field is to blame.
struct ApiError : std::exception {
  ApiError(int status_, std::string code_, std::string param_, std::string message_)
      : status(status_), code(std::move(code_)), param(std::move(param_)), message(std::move(message_)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string body() const;  // {"error": {"message", "type", "param", "code"}}

  int status;
  std::string code, param, message;
  int retry_after = 0;  // seconds, for the Retry-After header; 0: none
};

// An Error of a lower layer about a field ("messages[0].role: expected ...") as status 400. `param` where the text
// names no field.
ApiError bad_value(std::string_view message, std::string_view param);

}  // namespace mm
