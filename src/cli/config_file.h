// Flags from a TOML file.
#pragma once

#include <string>
#include <vector>

namespace mm {

// Replaces `--config FILE` in the arguments of a command by the file's flags: each `key = value` becomes --key=value,
// once for each value of a list; keys may be written with _ for -. Flags that the command line has itself win. Unknown
// keys are then unknown flags. Error for a missing file, a line without `=`, and sections.
std::vector<std::string> expand_config_file(const std::vector<std::string>& args);

}  // namespace mm
