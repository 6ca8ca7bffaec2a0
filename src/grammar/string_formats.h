// The values of JSON schema's `format` for strings, as regular expressions of whole texts.
#pragma once

#include <string_view>

namespace mm::grammar {

// The expression of a format; empty if it is not known.
std::string_view format_pattern(std::string_view format);
inline constexpr std::string_view kFormats =
    "date, time, date-time, duration, uuid, email, hostname, ipv4, ipv6 or uri";

}  // namespace mm::grammar
