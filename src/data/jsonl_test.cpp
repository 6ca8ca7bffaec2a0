#include "data/jsonl.h"

#include <gtest/gtest.h>

#include <map>

#include "base/error.h"
#include "data/test_data.h"

namespace mm {
namespace {

using Lines = std::vector<std::pair<int64_t, std::string>>;

Lines read_lines(const std::string& path, size_t chunk = JsonlReader::default_chunk) {
  JsonlReader reader(path, chunk);
  JsonlChunk c;
  Lines out;
  while (reader.next(c)) {
    for_each_line(c, [&](int64_t n, std::string_view line) { out.emplace_back(n, line); });
  }
  EXPECT_EQ(reader.position(), reader.file_bytes());
  return out;
}

class JsonlTest : public ::testing::Test, public ScratchDir {};

TEST_F(JsonlTest, LineNumbersBlankLinesAndEnds) {
  const Lines want = {{1, "a"}, {3, "b c"}, {6, "d"}};
  EXPECT_EQ(read_lines(write("a", "a\n\nb c\n \t\n\r\nd\n")), want);
  EXPECT_EQ(read_lines(write("b", "a\r\n\r\nb c\r\n\r\n\r\nd")), want);  // CRLF, no last newline
  EXPECT_EQ(read_lines(write("c",
                             "\xef\xbb\xbf"
                             "a\n\nb c\n\n\nd\n")),
            want);  // byte order mark
  EXPECT_TRUE(read_lines(write("d", "")).empty());
  EXPECT_TRUE(read_lines(write("e", "\n\n")).empty());
  EXPECT_TRUE(read_lines(write("f", "\xef\xbb\xbf")).empty());
}

TEST_F(JsonlTest, EveryChunkSizeGivesTheSameLines) {
  std::string text;
  Lines want;
  for (int i = 1; i <= 200; i++) {
    const std::string line(static_cast<size_t>(i * 7 % 50 + 1), static_cast<char>('a' + i % 26));
    want.emplace_back(i, line);
    text += line + (i < 200 ? "\n" : "");
  }
  const std::string plain = write("p", text), gz = write("g", gzipped(text)), zst = write("z", zstd_compressed(text));
  for (const size_t chunk : {1u, 2u, 7u, 50u, 51u, 64u, 1000u, 5000u, 1u << 20}) {
    EXPECT_EQ(read_lines(plain, chunk), want) << chunk;
    EXPECT_EQ(read_lines(gz, chunk), want) << chunk;
    EXPECT_EQ(read_lines(zst, chunk), want) << chunk;
  }
}

TEST_F(JsonlTest, ChunksAreBoundedAndHoldWholeLines) {
  std::string text;
  for (int i = 0; i < 5000; i++) text += std::string(99, 'x') + "\n";
  JsonlReader reader(write("p", text), 1000);
  JsonlChunk c;
  int64_t line = 1;
  while (reader.next(c)) {
    EXPECT_EQ(c.first_line, line);
    EXPECT_LE(c.bytes.size(), 1100u);
    EXPECT_EQ(c.bytes.back(), '\n');
    line += static_cast<int64_t>(c.bytes.size()) / 100;
  }
  EXPECT_EQ(line, 5001);
}

TEST_F(JsonlTest, JoinedMembersAreOneFile) {
  const Lines want = {{1, "one"}, {2, "two three"}, {3, "four"}};
  EXPECT_EQ(read_lines(write("g", gzipped("one\ntwo ") + gzipped("three\nfour\n"))), want);
  EXPECT_EQ(read_lines(write("z", zstd_compressed("one\ntwo ") + zstd_compressed("three\nfour\n"))), want);
}

TEST_F(JsonlTest, DamagedFilesAreErrors) {
  std::string text;
  for (int i = 0; i < 20000; i++) text += std::to_string(i * 2654435761u) + "\n";
  for (const std::string& whole : {gzipped(text), zstd_compressed(text)}) {
    for (const size_t keep : {size_t{4}, size_t{100}, whole.size() / 2, whole.size() - 1}) {
      EXPECT_THROW(read_lines(write("cut", whole.substr(0, keep))), Error) << keep;
    }
    EXPECT_THROW(read_lines(write("tail", whole + "garbage behind the end")), Error);
  }
  std::string flipped = gzipped(text);
  flipped[flipped.size() / 2] ^= 0x55;
  EXPECT_THROW(read_lines(write("flip", flipped)), Error);
  EXPECT_THROW(JsonlReader(path("missing")), Error);
  EXPECT_THROW(JsonlReader{dir_}, Error);
}

TEST_F(JsonlTest, EndlessLineIsAnError) {
  std::string text = "short\n";
  text.append(JsonlReader::max_line + 1, 'x');
  JsonlReader reader(write("long.gz", gzipped(text)));
  JsonlChunk c;
  ASSERT_TRUE(reader.next(c));
  EXPECT_EQ(c.bytes, "short\n");
  try {
    reader.next(c);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("long.gz:2"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace mm
