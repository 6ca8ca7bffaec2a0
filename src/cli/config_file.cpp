#include "cli/config_file.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <sstream>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

static void check_lines(const std::string& text, const std::string& path) {  // CLI11's reader lets odd lines pass
  std::istringstream in(text);
  int number = 0;
  for (std::string line; std::getline(in, line);) {
    number++;
    line = CLI::detail::trim_copy(line);
    if (line.empty() || line[0] == '#') continue;
    const size_t equals = line.find('=');
    const std::string key = CLI::detail::trim_copy(line.substr(0, equals));
    const bool is_key = !key.empty() && std::all_of(key.begin(), key.end(), [](unsigned char c) {
      return std::isalnum(c) != 0 || c == '-' || c == '_';
    });
    if (equals == std::string::npos || !is_key) {
      throw Error(fmt::format("{}:{}", path, number), "flag = value (lists on one line, no sections)",
                  "\"" + line.substr(0, 80) + "\"");
    }
  }
}

static std::vector<std::string> read_flags(const std::string& path, const std::vector<std::string>& given) {
  const std::string text = read_file(path, 1 << 20);
  check_lines(text, path);
  std::istringstream in(text);
  std::vector<std::string> flags;
  for (const CLI::ConfigItem& item : CLI::ConfigTOML().from_config(in)) {
    std::string flag = "--" + item.name;
    std::replace(flag.begin(), flag.end(), '_', '-');
    const bool has = std::any_of(given.begin(), given.end(),
                                 [&](const std::string& arg) { return arg == flag || arg.rfind(flag + "=", 0) == 0; });
    if (has) continue;
    for (const std::string& value : item.inputs) {
      flags.push_back(flag);
      if (value.empty()) flags.emplace_back();  // behind '=' CLI11 would take the next flag in its place
      else flags.back().append("=").append(value);
    }
  }
  return flags;
}

std::vector<std::string> expand_config_file(const std::vector<std::string>& args) {
  std::vector<std::string> out;
  std::string path;
  for (size_t i = 0; i < args.size(); i++) {
    const bool separate = args[i] == "--config", joined = args[i].rfind("--config=", 0) == 0;
    if (!separate && !joined) {
      out.push_back(args[i]);
      continue;
    }
    if (!path.empty() || (separate && i + 1 == args.size()))
      throw Error("--config", "one TOML file", "none or several");
    path = separate ? args[++i] : args[i].substr(9);
  }
  if (path.empty()) return args;
  const auto flags = read_flags(path, out);
  out.insert(out.end(), flags.begin(), flags.end());
  return out;
}

}  // namespace mm
