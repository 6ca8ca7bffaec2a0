#include "grammar/string_formats.h"

#include <fmt/format.h>

#include <map>
#include <string>

namespace mm::grammar {

namespace {

std::map<std::string, std::string, std::less<>> make_formats() {
  // Days that exist, from the year 1 on: 31, 30 and 28 days, and 29 February of leap years.
  const std::string year = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)";
  const std::string by_four = "(?:0[48]|[2468][048]|[13579][26])";
  const std::string date = "(?:" + year +
                           "-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)" +
                           "|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{2}" + by_four + "|" + by_four + "00)-02-29)";
  const std::string hour_minute = "(?:[01][0-9]|2[0-3]):[0-5][0-9]";
  const std::string time = hour_minute + ":[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-]" + hour_minute + ")";
  const std::string n = "[0-9]{1,4}";
  const std::string clock = "T(?:" + n + "H(?:" + n + "M(?:" + n + "S)?)?|" + n + "M(?:" + n + "S)?|" + n + "S)";
  const std::string days = "(?:" + n + "D|" + n + "M(?:" + n + "D)?|" + n + "Y(?:" + n + "M(?:" + n + "D)?)?)";
  const std::string label = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?";
  const std::string top = "[A-Za-z]{2,24}";
  const std::string domain = "(?:" + label + "\\.){1,3}" + top;
  const std::string atom = "[A-Za-z0-9_+-]{1,20}";
  const std::string byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
  const std::string ipv4 = "(?:" + byte + "\\.){3}" + byte;
  const std::string h = "[0-9a-fA-F]{1,4}";
  std::string ipv6 = "(?:" + h + ":){7}" + h + "|(?:" + h + ":){1,7}:|:(?::" + h + "){1,7}|::";
  for (int left = 1; left <= 6; left++) ipv6 += fmt::format("|(?:{0}:){{{1}}}(?::{0}){{1,{2}}}", h, left, 7 - left);
  const std::string path = "[A-Za-z0-9._~!$&'()*+,;=:@/-]", escaped = "%[0-9A-Fa-f]{2}";
  const std::string text = "(?:" + path + "|" + escaped + ")*", query = "(?:" + path + "|[?]|" + escaped + ")*";
  return {
      {"date", date},
      {"time", time},
      {"date-time", date + "T" + time},
      {"duration", "P(?:" + n + "W|" + clock + "|" + days + "(?:" + clock + ")?)"},
      {"uuid", "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"},
      {"email", atom + "(?:\\." + atom + "){0,2}@" + domain},
      {"hostname", "(?:" + label + "\\.){0,3}" + label},
      {"ipv4", ipv4},
      {"ipv6", ipv6},
      {"uri", "[A-Za-z][A-Za-z0-9+.-]{1,15}://(?:" + domain + "|localhost|" + ipv4 + ")(?::[0-9]{1,4})?(?:/" + text +
                  ")?(?:[?]" + query + ")?(?:#" + query + ")?"},
  };
}

}  // namespace

std::string_view format_pattern(std::string_view format) {
  static const auto formats = make_formats();
  const auto it = formats.find(format);
  return it == formats.end() ? std::string_view() : std::string_view(it->second);
}

}  // namespace mm::grammar
