#include "serve/access.h"

#include <algorithm>
#include <cctype>

namespace mm {

static bool same_text(std::string_view a, std::string_view b) {  // without case
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

bool same_secret(std::string_view given, std::string_view secret) {
  unsigned difference = given.size() == secret.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); i++)
    difference |= static_cast<unsigned char>(given[i]) ^
                  static_cast<unsigned char>(secret.empty() ? 0 : secret[i % secret.size()]);
  const volatile unsigned result = difference;  // keeps the loop whole
  return result == 0;
}

bool key_allowed(const AccessRules& rules, std::string_view authorization) {
  if (rules.api_key.empty()) return true;
  constexpr std::string_view scheme = "Bearer ";
  if (!same_text(authorization.substr(0, scheme.size()), scheme)) return false;
  return same_secret(authorization.substr(scheme.size()), rules.api_key);
}

static std::string_view without_port(std::string_view host) {
  if (host.starts_with('[')) {
    const size_t end = host.find(']');
    return end == std::string_view::npos ? host : host.substr(1, end - 1);
  }
  return host.substr(0, host.find(':'));
}

bool is_loopback_name(std::string_view name) {
  if (same_text(name, "localhost") || name == "::1") return true;
  if (name.size() > 10 && same_text(name.substr(name.size() - 10), ".localhost")) return true;
  const bool digits =
      std::all_of(name.begin(), name.end(), [](unsigned char c) { return c == '.' || std::isdigit(c) != 0; });
  return digits && name.starts_with("127.");
}

bool host_allowed(const AccessRules& rules, std::optional<std::string_view> host) {
  if (!rules.loopback || !host) return true;
  const std::string_view name = without_port(*host);
  return is_loopback_name(name) || std::any_of(rules.allowed_hosts.begin(), rules.allowed_hosts.end(),
                                               [&](const std::string& h) { return same_text(h, name); });
}

static bool listed(const AccessRules& rules, std::string_view origin) {
  return std::any_of(rules.origins.begin(), rules.origins.end(),
                     [&](const std::string& o) { return o == "*" || same_text(o, origin); });
}

bool origin_allowed(const AccessRules& rules, std::string_view origin, std::string_view host) {
  if (origin.empty() || listed(rules, origin)) return true;
  if (host.empty()) return false;
  for (const std::string_view scheme : {"http://", "https://"})  // a proxy may have taken the s off
    if (origin.starts_with(scheme) && same_text(origin.substr(scheme.size()), host)) return true;
  return false;
}

std::string_view allow_origin(const AccessRules& rules, std::string_view origin) {
  return !origin.empty() && listed(rules, origin) ? origin : std::string_view();
}

}  // namespace mm
