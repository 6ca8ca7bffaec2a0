// JSON lines in, JSON lines out, by all cores and in order.
#pragma once

#include <functional>
#include <string>

#include "base/json.h"

namespace mm {

// Reads JSON lines from standard input (plain, gzip or zstd), calls f(object, where, out) for each on any thread and
// writes what f appended to `out` as one line on standard output, in the order of the input. Memory: a few MiB a
// thread. f throws Error for a bad line; the lines before it are written, then the Error (with its line number) is
// thrown.
void map_json_lines(const std::function<void(const ordered_json& line, const std::string& where, std::string& out)>& f);

}  // namespace mm
