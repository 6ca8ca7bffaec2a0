// Where the tests of this folder find their files.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/test_error.h"

namespace mm {

inline const std::string kShared = std::string(MM_SOURCE_DIR) + "/../shared";
inline const std::string kGolden = std::string(MM_SOURCE_DIR) + "/tests/golden/tokenizer";

inline std::vector<ordered_json> json_lines(const std::string& path, size_t at_most = SIZE_MAX) {
  std::ifstream in(path);
  EXPECT_TRUE(in) << path;
  std::vector<ordered_json> rows;
  for (std::string line; rows.size() < at_most && std::getline(in, line);) rows.push_back(parse_json(line, path));
  return rows;
}

}  // namespace mm

#define MM_REQUIRE_SHARED() \
  if (!mm::dir_exists(mm::kShared)) GTEST_SKIP() << "NOT CHECKED against the oracle: " << mm::kShared << " is missing"
