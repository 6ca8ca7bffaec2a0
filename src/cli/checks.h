// Checks of flags' values, with messages as everywhere: "expected ..., found ...". CLI11's own print the ends of a
// range of doubles in full (309 digits) and let NaN pass.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace mm {

CLI::Validator above_zero();
CLI::Validator at_least(int64_t low);
template <class T>  // int, int64_t, double; both ends included
CLI::Validator in_range(T low, T high);

CLI::Validator not_empty(const std::string& what);  // "a file": what the empty text would have to be
CLI::Validator secret();  // not empty, and no flag that a forgotten value made the next one in its place
CLI::Validator origin();  // of web pages: '*' or SCHEME://HOST[:PORT]

}  // namespace mm
