// Who may ask: key, Host and Origin of a request.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

struct AccessRules {
  bool loopback = true;                    // bound to this machine alone: the Host header must name it
  std::vector<std::string> allowed_hosts;  // further names in Host, without port
  std::vector<std::string> origins;        // that pages of other sites may ask from; "*": any
  std::string api_key;                     // "": none needed
};

// The time does not tell how much of it is right.
bool same_secret(std::string_view given, std::string_view secret);
bool key_allowed(const AccessRules& rules, std::string_view authorization);  // "Bearer KEY"
// A page of another site can make a browser send requests to a server on the same machine, under a name of its own
// (DNS rebinding). So the name must be one of this machine's. Browsers always send it; nullopt: an HTTP/1.0 client that
// did not.
bool host_allowed(const AccessRules& rules, std::optional<std::string_view> host);
// No Origin, the server's own (as Host says), or a listed one.
bool origin_allowed(const AccessRules& rules, std::string_view origin, std::string_view host);
// The value of Access-Control-Allow-Origin, "" for none.
std::string_view allow_origin(const AccessRules& rules, std::string_view origin);
bool is_loopback_name(std::string_view host);  // localhost, 127.x.y.z, ::1, without port

}  // namespace mm
