// Python's json.dumps(value, ensure_ascii=False).
#include <charconv>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "text/chat_template.h"

namespace mm {

namespace {

void append_string(const std::string& s, std::string& out) {
  out += '"';
  for (const char c : s) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) out += fmt::format("\\u{:04x}", static_cast<int>(c));
        else out += c;
    }
  }
  out += '"';
}

// repr(float): the shortest digits that read back equal, in scientific form below 1e-4 and from 1e16.
void append_float(double v, std::string& out) {
  if (std::isnan(v) || std::isinf(v)) {
    out += std::isnan(v) ? "NaN" : v > 0 ? "Infinity" : "-Infinity";
    return;
  }
  char buffer[64];
  const double size = std::fabs(v);
  const bool scientific = v != 0 && (size < 1e-4 || size >= 1e16);
  const auto format = scientific ? std::chars_format::scientific : std::chars_format::fixed;
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, v, format);
  MM_CHECK(end.ec == std::errc{});
  out.append(buffer, end.ptr);
  if (!scientific && std::memchr(buffer, '.', static_cast<size_t>(end.ptr - buffer)) == nullptr) out += ".0";
}

}  // namespace

void append_python_json(const ordered_json& value, std::string& out) {
  switch (value.type()) {
    case ordered_json::value_t::string: append_string(value.get_ref<const std::string&>(), out); break;
    case ordered_json::value_t::number_float: append_float(value.get<double>(), out); break;
    case ordered_json::value_t::array: {
      out += '[';
      const char* comma = "";
      for (const ordered_json& item : value) {
        out += comma;
        comma = ", ";
        append_python_json(item, out);
      }
      out += ']';
      break;
    }
    case ordered_json::value_t::object: {
      out += '{';
      const char* comma = "";
      for (const auto& [key, item] : value.items()) {
        out += comma;
        comma = ", ";
        append_string(key, out);
        out += ": ";
        append_python_json(item, out);
      }
      out += '}';
      break;
    }
    default: out += value.dump();  // null, true, false, integers
  }
}

}  // namespace mm
