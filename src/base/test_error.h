// For tests of what goes wrong.
#pragma once

#include <string>

#include "base/error.h"

namespace mm {

// The message of the Error that f throws, or "" if it throws none.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace mm
