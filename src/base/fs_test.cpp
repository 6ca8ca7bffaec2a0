#include "base/fs.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/error.h"

namespace mm {

namespace stdfs = std::filesystem;

class Fs : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "fs_test";
    stdfs::remove_all(dir_);
    make_dirs(dir_);
  }
  void TearDown() override { stdfs::remove_all(dir_); }
  size_t files() const {
    return static_cast<size_t>(std::distance(stdfs::directory_iterator(dir_), stdfs::directory_iterator()));
  }
  std::string dir_;
};

TEST_F(Fs, WhatIsWrittenIsRead) {
  const std::string path = path_join(dir_, "a/b/c.bin");
  const std::string content("x\0y\n", 4);
  write_file(path, content);
  EXPECT_EQ(read_file(path), content);
  const MappedFile map(path);
  EXPECT_EQ(map.text(), content);
  write_file(path, "");
  EXPECT_EQ(read_file(path), "");
  EXPECT_EQ(MappedFile(path).size(), 0u);
}

TEST_F(Fs, UncommittedFileLeavesNothingAndKeepsTheOld) {
  const std::string path = path_join(dir_, "x");
  {
    AtomicFile file(path);
    file.write("half");
  }
  EXPECT_EQ(files(), 0u);
  {
    AtomicFile file(path_join(dir_, "a/b/x"));
    file.write("half");
  }
  EXPECT_EQ(files(), 0u);  // nor the folders made for it
  write_file(path, "old");
  {
    AtomicFile file(path);
    file.write("half");
  }
  EXPECT_EQ(read_file(path), "old");
  EXPECT_EQ(files(), 1u);
}

TEST_F(Fs, FailedCommitLeavesNothing) {
  const std::string path = path_join(dir_, "folder");
  make_dirs(path_join(path, "full"));
  EXPECT_THROW(write_file(path, "x"), Error);  // a file cannot replace a folder
  EXPECT_EQ(files(), 1u);
}

TEST_F(Fs, Errors) {
  EXPECT_THROW(read_file(path_join(dir_, "missing")), Error);
  EXPECT_THROW(read_file(dir_), Error);
  EXPECT_THROW(MappedFile{dir_}, Error);
  EXPECT_THROW(write_file("/dev/null/x", "y"), Error);
  write_file(path_join(dir_, "ten"), "0123456789");
  EXPECT_THROW(read_file(path_join(dir_, "ten"), 9), Error);
  EXPECT_EQ(read_file(path_join(dir_, "ten"), 10).size(), 10u);
  try {
    read_file("/nowhere/at/all");
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("/nowhere/at/all"), std::string::npos);
  }
}

TEST_F(Fs, NothingIsOverwrittenSilently) {
  EXPECT_NO_THROW(require_new_dir(dir_, false));
  EXPECT_NO_THROW(require_new_dir(path_join(dir_, "absent"), false));
  write_file(path_join(dir_, "x"), "y");
  EXPECT_THROW(require_new_dir(dir_, false), Error);
  EXPECT_NO_THROW(require_new_dir(dir_, true));
}

TEST(Hash, DependsOnEveryByteAndTheSeed) {
  EXPECT_EQ(hash_bytes("abc"), hash_bytes("abc"));
  EXPECT_NE(hash_bytes("abc"), hash_bytes("abd"));
  EXPECT_NE(hash_bytes("abc"), hash_bytes(std::string_view("abc\0", 4)));
  EXPECT_NE(hash_bytes("abc"), hash_bytes("abc", 7));
}

}  // namespace mm
