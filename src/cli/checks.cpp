#include "cli/checks.h"

#include <fmt/format.h>

#include <cmath>
#include <regex>

namespace mm {

static std::string refused(const std::string& expected, const std::string& found) {
  return fmt::format("expected {}, found {}", expected, found.empty() ? "none" : found);
}

template <class F>
static CLI::Validator number_check(const char* type, const std::string& expected, F&& holds) {
  return {[=](std::string& text) {
            double value = NAN;
            const bool is_number = CLI::detail::lexical_cast(text, value) && std::isfinite(value);
            return is_number && holds(value) ? std::string() : refused(expected, text);
          },
          type};
}

CLI::Validator above_zero() {
  return number_check("POSITIVE", "a number above 0", [](double x) { return x > 0; });
}

CLI::Validator at_least(int64_t low) {
  return number_check(low == 0 ? "NONNEGATIVE" : "POSITIVE", fmt::format("a number, {} or more", low),
                      [low](double x) { return x >= static_cast<double>(low); });
}

template <class T>
CLI::Validator in_range(T low, T high) {
  const auto text_of = [](T x) {
    if constexpr (std::is_floating_point_v<T>) return fmt::format("{:.7g}", x);
    else return fmt::format("{}", x);
  };
  const std::string first = text_of(low), last = text_of(high);
  return {[=](std::string& text) {
            T value{};
            const bool holds = CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
            return holds ? std::string() : refused(fmt::format("{} to {}", first, last), text);
          },
          fmt::format("{} in [{} - {}]", CLI::detail::type_name<T>(), first, last)};
}
template CLI::Validator in_range(int, int);
template CLI::Validator in_range(int64_t, int64_t);
template CLI::Validator in_range(double, double);

CLI::Validator not_empty(const std::string& what) {
  return {[what](std::string& text) { return text.empty() ? refused(what, "an empty text") : std::string(); }, ""};
}

CLI::Validator secret() {
  return {[](std::string& text) {
            if (text.empty()) return refused("a key", "an empty one; leave the flag out to need none");
            // Not shown: it may be the key after all.
            if (text.starts_with("--")) return refused("a key", "a flag; keys that begin with -- go into a file");
            return std::string();
          },
          ""};
}

CLI::Validator origin() {
  return {
      [](std::string& text) {
        static const std::regex form(R"([A-Za-z][A-Za-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?)");
        // A long text would overflow the stack of std::regex; names end at 253 characters.
        const bool holds = text == "*" || (text.size() < 300 && std::regex_match(text, form));
        return holds ? std::string()
                     : refused("'*' or SCHEME://HOST[:PORT], as https://example.com", "\"" + text.substr(0, 80) + "\"");
      },
      ""};
}

}  // namespace mm
