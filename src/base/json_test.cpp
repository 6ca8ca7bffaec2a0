#include "base/json.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace mm {

static std::string message_of(const std::string& text) {
  try {
    parse_json(text, "here");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Json, KeepsOrderAndValues) {
  const auto v = parse_json(R"({"b": 1, "a": [true, null, "é\u4e2d"]})", "x");
  EXPECT_EQ(v.begin().key(), "b");
  EXPECT_EQ(v.dump(), R"({"b":1,"a":[true,null,"é中"]})");
}

TEST(Json, BadTextIsOneShortLineThatNamesThePlace) {
  const std::string bad[] = {"",
                             "{",
                             "{\"a\": 1,}",
                             "{\"a\": \"\xff\"}",
                             "[1] [2]",
                             "nul",
                             "\"" + std::string(100000, 'x'),
                             std::string(1000, '['),
                             "{\"a\": \"\n\"}"};
  for (const auto& text : bad) {
    const std::string message = message_of(text);
    EXPECT_EQ(message.rfind("here: expected ", 0), 0u) << text.substr(0, 30) << " gave " << message;
    EXPECT_LT(message.size(), 400u);
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(Json, NestingIsBounded) {
  EXPECT_NO_THROW(parse_json(std::string(128, '[') + std::string(128, ']'), "x"));
  EXPECT_THROW(parse_json(std::string(129, '[') + std::string(129, ']'), "x"), Error);
  EXPECT_NO_THROW(parse_json("\"" + std::string(1000, '[') + "\\\"[\"", "x"));  // brackets in a string do not count
}

TEST(Json, TypedFields) {
  const auto v = parse_json(R"({"i": 5, "f": 0.5, "s": "t", "b": false, "n": null})", "file");
  EXPECT_EQ(json_get<int64_t>(v, "i", "file"), 5);
  EXPECT_EQ(json_get<double>(v, "i", "file"), 5.0);
  EXPECT_EQ(json_get<std::string>(v, "s", "file"), "t");
  EXPECT_EQ(json_get_or<int>(v, "absent", 7, "file"), 7);
  EXPECT_EQ(json_get_or<int>(v, "n", 7, "file"), 7);
  EXPECT_THROW(json_get<int64_t>(v, "f", "file"), Error);
  EXPECT_THROW(json_get<bool>(v, "i", "file"), Error);
  EXPECT_THROW(json_get<int>(v, "absent", "file"), Error);
  EXPECT_THROW(json_get_or<std::string>(v, "i", "", "file"), Error);
}

}  // namespace mm
