#include "lab/calculator.h"

#include <cstdint>

namespace mm {

namespace {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  std::optional<int64_t> whole() {
    const auto value = sum();
    skip_spaces();
    return at_ == text_.size() ? value : std::nullopt;
  }

 private:
  void skip_spaces() {
    while (at_ < text_.size() && text_[at_] == ' ') at_++;
  }
  char next(std::string_view wanted) {  // the character if it is one of these
    skip_spaces();
    return at_ < text_.size() && wanted.find(text_[at_]) != std::string_view::npos ? text_[at_++] : '\0';
  }

  std::optional<int64_t> sum() {
    auto left = product();
    while (left) {
      const char op = next("+-");
      if (!op) return left;
      const auto right = product();
      int64_t value;
      if (!right ||
          (op == '+' ? __builtin_add_overflow(*left, *right, &value) : __builtin_sub_overflow(*left, *right, &value)))
        return std::nullopt;
      left = value;
    }
    return left;
  }

  std::optional<int64_t> product() {
    auto left = factor();
    while (left) {
      const char op = next("*/");
      if (!op) return left;
      const auto right = factor();
      int64_t value;
      if (!right) return std::nullopt;
      if (op == '*') {
        if (__builtin_mul_overflow(*left, *right, &value)) return std::nullopt;
      } else {
        if (*right == 0 || (*left == INT64_MIN && *right == -1) || *left % *right != 0) return std::nullopt;
        value = *left / *right;
      }
      left = value;
    }
    return left;
  }

  std::optional<int64_t> factor() {
    if (next("-")) {
      const auto value = nested(&Parser::factor);
      return value && *value != INT64_MIN ? std::optional(-*value) : std::nullopt;
    }
    if (next("(")) {
      const auto value = nested(&Parser::sum);
      return next(")") ? value : std::nullopt;
    }
    skip_spaces();
    int64_t value = 0;
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, text_[at_] - '0', &value))
        return std::nullopt;
      at_++;
    }
    return at_ > begin ? std::optional(value) : std::nullopt;
  }

  std::optional<int64_t> nested(std::optional<int64_t> (Parser::*part)()) {
    if (depth_ == 64) return std::nullopt;
    depth_++;
    const auto value = (this->*part)();
    depth_--;
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

std::optional<int64_t> calculate(std::string_view expression) { return Parser(expression).whole(); }

}  // namespace mm
