// Files: whole reads, memory maps, and writes that are either complete or absent.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

// Reads a whole file. Throws Error if it is missing, unreadable or larger than max_bytes.
std::string read_file(const std::string& path, uint64_t max_bytes = uint64_t{1} << 30);

// Writes to a temporary in the same folder, fsyncs it, renames it over `path` and fsyncs the folder. On any failure the
// temporary is removed, `path` keeps its old content and an Error is thrown. Creates missing parent folders, and
// removes them again on failure if they are still empty.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();  // not committed: removes the temporary
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, size_t n);
  void write(std::string_view s) { write(s.data(), s.size()); }
  void commit();

 private:
  void abandon();
  std::string path_, tmp_;
  std::vector<std::string> made_;  // folders that the constructor made, the deepest first
  int fd_ = -1;
};

void write_file(const std::string& path, std::string_view content);  // AtomicFile in one call

// Appends to a file (made if missing). Every write reaches the operating system before it returns, so a killed process
// loses nothing; a full disk or the like is an Error. Not thread safe.
class AppendFile {
 public:
  AppendFile() = default;
  explicit AppendFile(const std::string& path, bool must_be_new = false);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;
  AppendFile(AppendFile&& other) noexcept;
  AppendFile& operator=(AppendFile&& other) noexcept;
  void write(std::string_view bytes);
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
};

// Read-only memory map of a whole file; empty files map to size 0. Pages are shared with the page cache, so a file
// larger than memory can be mapped. A file shortened by another process while mapped is outside our control.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const char* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

void fsync_dir(const std::string& dir);  // makes renames in it durable; a folder that cannot be opened is passed over
bool file_exists(const std::string& path);
bool dir_exists(const std::string& path);
std::string path_join(const std::string& a, const std::string& b);
void make_dirs(const std::string& path);  // mkdir -p; Error if it cannot be made or written
// Error unless `dir` is absent, empty, or `overwrite` is set: nothing is overwritten silently.
void require_new_dir(const std::string& dir, bool overwrite);
// 64-bit FNV-1a style hash for cache keys; not for security.
uint64_t hash_bytes(std::string_view bytes, uint64_t seed = 0xcbf29ce484222325ull);

}  // namespace mm
