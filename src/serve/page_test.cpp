#include "serve/page.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

namespace mm {
namespace {

// What the binary holds of a file: no indentation, no empty lines, no lines of comment.
std::string stripped(const std::filesystem::path& path) {
  std::ifstream in(path);
  EXPECT_TRUE(in.is_open()) << path;
  std::string out;
  for (std::string line; std::getline(in, line);) {
    line.erase(0, std::min(line.size(), line.find_first_not_of(' ')));
    const bool comment = line.starts_with("//") || (line.starts_with("/*") && line.ends_with("*/"));
    if (!line.empty() && !comment) out += line + "\n";
  }
  return out;
}

TEST(Page, FilesAreThoseOfTheWebFolder) {
  size_t total = 0;
  std::set<std::string_view> etags;
  for (const auto& entry : std::filesystem::directory_iterator(MM_SOURCE_DIR "/web")) {
    const std::string name = entry.path().filename();
    const PageFile* file = find_page_file(name == "index.html" ? "/" : "/" + name);
    ASSERT_NE(file, nullptr) << name;
    EXPECT_EQ(file->body, stripped(entry.path())) << name;
    EXPECT_TRUE(file->etag.size() == 18 && file->etag.front() == '"' && file->etag.back() == '"') << file->etag;
    EXPECT_TRUE(etags.insert(file->etag).second) << name;
    total += file->body.size();
  }
  EXPECT_GT(etags.size(), 10u);
  EXPECT_LT(total, 120'000u);  // bytes of the whole page
  EXPECT_EQ(find_page_file("/")->mime, "text/html; charset=utf-8");
  EXPECT_EQ(find_page_file("/main.js")->mime, "text/javascript; charset=utf-8");
  EXPECT_EQ(find_page_file("/style.css")->mime, "text/css; charset=utf-8");
}

TEST(Page, OtherPathsAreNoFiles) {
  for (const char* path : {"", "/index.html", "main.js", "/main.js?", "/../web/main.js", "//"})
    EXPECT_EQ(find_page_file(path), nullptr) << path;
}

}  // namespace
}  // namespace mm
