#include "serve/page.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <sstream>

namespace mm {
namespace {

std::string read_web(const std::string& name) {
  std::ifstream in(std::string(MM_SOURCE_DIR) + "/web/" + name, std::ios::binary);
  EXPECT_TRUE(in.is_open()) << name;
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

TEST(Page, FilesAreThoseOfTheWebFolder) {
  const PageFile* index = find_page_file("/");
  ASSERT_NE(index, nullptr);
  EXPECT_EQ(index->body, read_web("index.html"));
  EXPECT_EQ(index->mime, "text/html; charset=utf-8");
  const PageFile* main = find_page_file("/main.js");
  ASSERT_NE(main, nullptr);
  EXPECT_EQ(main->body, read_web("main.js"));
  EXPECT_EQ(main->mime, "text/javascript; charset=utf-8");
  EXPECT_NE(main->etag, index->etag);
  EXPECT_TRUE(main->etag.size() == 18 && main->etag.front() == '"' && main->etag.back() == '"') << main->etag;
}

TEST(Page, OtherPathsAreNoFiles) {
  for (const char* path : {"", "/index.html", "main.js", "/main.js?", "/../web/main.js", "//"})
    EXPECT_EQ(find_page_file(path), nullptr) << path;
}

}  // namespace
}  // namespace mm
