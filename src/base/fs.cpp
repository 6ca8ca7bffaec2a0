#include "base/fs.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "base/error.h"

namespace mm {

namespace stdfs = std::filesystem;

static int open_for_read(const std::string& path, struct stat& st) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw system_error("cannot open for reading", path);
  if (::fstat(fd, &st) != 0 || S_ISDIR(st.st_mode)) {
    const bool is_dir = S_ISDIR(st.st_mode);
    ::close(fd);
    if (is_dir) throw Error(path, "a file", "a folder", "name a file inside it");
    throw system_error("cannot stat", path);
  }
  return fd;
}

std::string read_file(const std::string& path, uint64_t max_bytes) {
  struct stat st {};
  const int fd = open_for_read(path, st);
  std::string out;
  const bool too_large = S_ISREG(st.st_mode) && static_cast<uint64_t>(st.st_size) > max_bytes;
  if (S_ISREG(st.st_mode) && !too_large) out.reserve(static_cast<size_t>(st.st_size));
  char buf[1 << 16];
  for (;;) {
    const ssize_t n = ::read(fd, buf, sizeof buf);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const Error e = system_error("read failed", path);
      ::close(fd);
      throw e;
    }
    if (n == 0) break;
    out.append(buf, static_cast<size_t>(n));
    if (too_large || out.size() > max_bytes) {
      ::close(fd);
      throw Error(path, fmt::format("at most {} bytes", max_bytes), "a larger file", "");
    }
  }
  ::close(fd);
  return out;
}

void fsync_dir(const std::string& dir) {
  const int fd = ::open(dir.empty() ? "." : dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);
  ::close(fd);
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  static std::atomic<unsigned> counter{0};
  const std::string parent = stdfs::path(path_).parent_path().string();
  for (stdfs::path p = parent; !p.empty() && !dir_exists(p.string()); p = p.parent_path()) made_.push_back(p.string());
  if (!parent.empty()) make_dirs(parent);
  tmp_ = fmt::format("{}.tmp.{}.{}", path_, ::getpid(), counter++);
  fd_ = ::open(tmp_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd_ < 0) {
    const Error e = system_error("cannot create", path_);
    abandon();
    throw e;
  }
}

void AtomicFile::abandon() {
  ::unlink(tmp_.c_str());
  for (const auto& dir : made_) ::rmdir(dir.c_str());
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    abandon();
  }
}

void AtomicFile::write(const void* data, size_t n) {
  const char* p = static_cast<const char*>(data);
  while (n > 0) {
    const ssize_t k = ::write(fd_, p, n);
    if (k < 0 && errno == EINTR) continue;
    if (k <= 0) throw system_error("write failed (is the disk full?)", path_);
    p += k;
    n -= static_cast<size_t>(k);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) throw system_error("fsync failed (is the disk full?)", path_);
  if (::close(fd_) != 0) {
    const Error e = system_error("close failed (is the disk full?)", path_);
    fd_ = -1;
    abandon();
    throw e;
  }
  fd_ = -1;
  if (::rename(tmp_.c_str(), path_.c_str()) != 0) {
    const Error e = system_error("rename failed", path_);
    abandon();
    throw e;
  }
  fsync_dir(stdfs::path(path_).parent_path().string());
}

void write_file(const std::string& path, std::string_view content) {
  AtomicFile f(path);
  f.write(content);
  f.commit();
}

AppendFile::AppendFile(const std::string& path, bool must_be_new) : path_(path) {
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (must_be_new ? O_EXCL : 0), 0644);
  if (fd_ < 0) throw system_error("cannot open for writing", path);
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) ::close(fd_);
}

AppendFile::AppendFile(AppendFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

AppendFile& AppendFile::operator=(AppendFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

void AppendFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw system_error("write failed", path_);
    bytes.remove_prefix(static_cast<size_t>(n));
  }
}

MappedFile::MappedFile(const std::string& path) {
  struct stat st {};
  const int fd = open_for_read(path, st);
  size_ = static_cast<size_t>(st.st_size);
  if (size_ > 0) {
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) {
      const Error e = system_error("mmap failed", path);
      ::close(fd);
      throw e;
    }
    data_ = static_cast<const char*>(p);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

bool file_exists(const std::string& path) {
  std::error_code ec;
  return stdfs::is_regular_file(path, ec);
}

bool dir_exists(const std::string& path) {
  std::error_code ec;
  return stdfs::is_directory(path, ec);
}

std::string path_join(const std::string& a, const std::string& b) { return (stdfs::path(a) / b).string(); }

void make_dirs(const std::string& path) {
  std::error_code ec;
  stdfs::create_directories(path, ec);
  if (ec) throw Error(fmt::format("{}: cannot create folder: {}", path, ec.message()));
}

void require_new_dir(const std::string& dir, bool overwrite) {
  std::error_code ec;
  if (overwrite || !stdfs::exists(dir, ec)) return;
  if (!stdfs::is_directory(dir, ec)) throw Error(dir, "a folder", "a file", "choose another path");
  if (stdfs::directory_iterator(dir, ec) != stdfs::directory_iterator{}) {
    throw Error(dir, "a new or empty folder", "one that already holds files", "choose another or pass --overwrite");
  }
}

uint64_t hash_bytes(std::string_view bytes, uint64_t seed) {
  // FNV-1a over 8-byte words with a final mix: fast enough to hash a data set while it is read.
  uint64_t h = seed;
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint64_t w;
    std::memcpy(&w, bytes.data() + i, 8);
    h = (h ^ w) * 0x100000001b3ull;
    h ^= h >> 29;
  }
  for (; i < bytes.size(); i++) h = (h ^ static_cast<unsigned char>(bytes[i])) * 0x100000001b3ull;
  h ^= bytes.size();
  h *= 0xff51afd7ed558ccdull;
  return h ^ (h >> 32);
}

}  // namespace mm
