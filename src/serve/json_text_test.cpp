#include "serve/json_text.h"

#include <gtest/gtest.h>

#include "base/json.h"

namespace mm {
namespace {

std::string as_json(std::string_view text) {
  std::string out;
  append_json_string(text, out);
  return out;
}

TEST(JsonText, EscapesWhatMustBe) {
  EXPECT_EQ(as_json("a\"b\\c\n\r\t\x01\x1f/"), R"("a\"b\\c\n\r\t\u0001\u001f/")");
  EXPECT_EQ(as_json("你好 é 🎉"), "\"你好 é 🎉\"");
  EXPECT_EQ(as_json(std::string_view("\0", 1)), R"("\u0000")");
}

TEST(JsonText, AnyBytesBecomeValidJson) {
  uint64_t state = 1;
  for (int round = 0; round < 3000; round++) {
    std::string bytes;
    for (int i = 0; i < 12; i++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      // Mostly bytes that begin or go on with characters.
      bytes += static_cast<char>(round % 2 == 0 ? state >> 56 : 0x80 | (state >> 57));
    }
    const auto parsed = ordered_json::parse(as_json(bytes), nullptr, false);
    ASSERT_TRUE(parsed.is_string());
    EXPECT_EQ(parsed.get<std::string>(), to_utf8(bytes));
  }
}

TEST(JsonText, InvalidBytesAreReplaced) {
  EXPECT_EQ(to_utf8("a\xFFz"), "a\xEF\xBF\xBDz");
  EXPECT_EQ(to_utf8("\xE4\xBD"), "\xEF\xBF\xBD\xEF\xBF\xBD");  // cut
  EXPECT_EQ(to_utf8("\xED\xA0\x80").size(), 9u);               // a surrogate
  EXPECT_EQ(to_utf8("\xC0\xAF").size(), 6u);                   // overlong
  EXPECT_EQ(to_utf8("\xF4\x90\x80\x80").size(), 12u);          // beyond U+10FFFF
  EXPECT_EQ(to_utf8("\xF4\x8F\xBF\xBF"), "\xF4\x8F\xBF\xBF");
}

TEST(JsonText, Numbers) {
  std::string out;
  append_json_number(-0.125, out);
  out += ' ';
  append_json_number(1.0 / 0.0, out);
  EXPECT_EQ(out, "-0.125 null");
}

}  // namespace
}  // namespace mm
