#include <gtest/gtest.h>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

TEST(AppendFile, KeepsWhatWasThereAndIsReadableAtOnce) {
  const std::string path = testing::TempDir() + "append";
  write_file(path, "a\n");
  AppendFile file(path);
  file.write("b\n");
  EXPECT_EQ(read_file(path), "a\nb\n");
  AppendFile moved = std::move(file);
  moved.write("c\n");
  EXPECT_EQ(read_file(path), "a\nb\nc\n");
}

TEST(AppendFile, FailuresAreErrors) {
  const std::string path = testing::TempDir() + "append_twice";
  write_file(path, "");
  EXPECT_THROW(AppendFile(path, /*must_be_new=*/true), Error);
  EXPECT_THROW(AppendFile(testing::TempDir() + "no_such_folder/file"), Error);
  AppendFile full("/dev/full");
  EXPECT_THROW(full.write("x"), Error);
}

}  // namespace mm
