#include "data/jsonl.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

namespace {

// The stored bytes of a file through one buffer.
class StoredFile {
 public:
  explicit StoredFile(const std::string& path) : path_(path), buffer_(256 << 10) {
    if (dir_exists(path)) throw Error(path, "a file", "a folder", "name a .jsonl file inside it");
    file_.reset(std::fopen(path.c_str(), "rb"));
    if (!file_) throw system_error("cannot open for reading", path);
    std::error_code ec;
    const auto size = std::filesystem::file_size(path, ec);
    size_ = ec ? 0 : size;
  }
  // What is read but not consumed; reads more when nothing is left. Empty at the end of the file.
  std::string_view peek() {
    if (begin_ == end_) {
      begin_ = 0;
      end_ = std::fread(buffer_.data(), 1, buffer_.size(), file_.get());
      if (end_ == 0 && std::ferror(file_.get()) != 0) throw system_error("read failed", path_);
    }
    return {buffer_.data() + begin_, end_ - begin_};
  }
  void consume(size_t n) {
    begin_ += n;
    position_ += n;
  }
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  uint64_t position() const { return position_; }

 private:
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;
  uint64_t size_ = 0, position_ = 0;
};

class Decoder {
 public:
  explicit Decoder(StoredFile& file) : file_(file) {}
  virtual ~Decoder() = default;
  virtual size_t read(char* out, size_t n) = 0;  // 0 at the end

 protected:
  StoredFile& file_;
};

class PlainDecoder : public Decoder {
 public:
  using Decoder::Decoder;
  size_t read(char* out, size_t n) override {
    const std::string_view in = file_.peek();
    n = std::min(n, in.size());
    std::memcpy(out, in.data(), n);
    file_.consume(n);
    return n;
  }
};

class GzipDecoder : public Decoder {
 public:
  explicit GzipDecoder(StoredFile& file) : Decoder(file) {
    MM_CHECK(inflateInit2(&z_, 15 + 16) == Z_OK);  // + 16: gzip framing
  }
  ~GzipDecoder() override { inflateEnd(&z_); }
  size_t read(char* out, size_t n) override {
    z_.next_out = reinterpret_cast<Bytef*>(out);
    z_.avail_out = static_cast<uInt>(n);
    while (z_.avail_out == n) {
      const std::string_view in = file_.peek();
      if (in.empty()) {
        if (!between_members_)
          throw Error(file_.path(), "a complete gzip file", "its end in the middle", "copy it again");
        return 0;
      }
      if (between_members_) {  // files joined with cat have several members
        inflateReset(&z_);
        between_members_ = false;
      }
      z_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(in.data()));
      z_.avail_in = static_cast<uInt>(in.size());
      const int rc = inflate(&z_, Z_NO_FLUSH);
      file_.consume(in.size() - z_.avail_in);
      if (rc == Z_STREAM_END) between_members_ = true;
      else if (rc != Z_OK && rc != Z_BUF_ERROR) {
        throw Error(file_.path(), "valid gzip data", z_.msg != nullptr ? z_.msg : "damaged data",
                    "copy the file again");
      }
    }
    return n - z_.avail_out;
  }

 private:
  z_stream z_{};
  bool between_members_ = true;
};

class ZstdDecoder : public Decoder {
 public:
  explicit ZstdDecoder(StoredFile& file) : Decoder(file), stream_(ZSTD_createDStream()) {
    MM_CHECK(stream_ != nullptr);
  }
  ~ZstdDecoder() override { ZSTD_freeDStream(stream_); }
  size_t read(char* out, size_t n) override {
    ZSTD_outBuffer o{out, n, 0};
    while (o.pos == 0) {
      const std::string_view in = file_.peek();
      if (in.empty() && frame_done_) return 0;
      ZSTD_inBuffer i{in.data(), in.size(), 0};
      const size_t rc = ZSTD_decompressStream(stream_, &o, &i);
      if (ZSTD_isError(rc) != 0) {
        throw Error(file_.path(), "valid zstd data", ZSTD_getErrorName(rc), "copy the file again");
      }
      file_.consume(i.pos);
      frame_done_ = rc == 0;
      if (in.empty() && o.pos == 0 && !frame_done_) {
        throw Error(file_.path(), "a complete zstd file", "its end in the middle", "copy it again");
      }
    }
    return o.pos;
  }

 private:
  ZSTD_DStream* stream_;
  bool frame_done_ = true;
};

std::unique_ptr<Decoder> make_decoder(StoredFile& file) {
  const std::string_view head = file.peek();
  if (head.starts_with("\x1f\x8b")) return std::make_unique<GzipDecoder>(file);
  if (head.starts_with("\x28\xb5\x2f\xfd")) return std::make_unique<ZstdDecoder>(file);
  return std::make_unique<PlainDecoder>(file);
}

}  // namespace

struct JsonlReader::Impl {
  StoredFile file;
  std::unique_ptr<Decoder> decoder;
  size_t chunk_bytes;
  std::string carry;  // the beginning of the next line
  int64_t line = 1;
  bool at_start = true;

  Impl(const std::string& path, size_t chunk) : file(path), decoder(make_decoder(file)), chunk_bytes(chunk) {}

  // Appends up to chunk_bytes; false at the end of the file.
  bool read_more(std::string& out) {
    const size_t old = out.size();
    out.resize(old + chunk_bytes);
    size_t got = 0;
    while (got < chunk_bytes) {
      const size_t n = decoder->read(out.data() + old + got, chunk_bytes - got);
      if (n == 0) break;
      got += n;
    }
    out.resize(old + got);
    return got > 0;
  }
};

JsonlReader::JsonlReader(const std::string& path, size_t chunk_bytes) {
  MM_CHECK(chunk_bytes > 0 && chunk_bytes < (size_t{1} << 30));
  impl_ = std::make_unique<Impl>(path, chunk_bytes);
}
JsonlReader::~JsonlReader() = default;
JsonlReader::JsonlReader(JsonlReader&&) noexcept = default;
uint64_t JsonlReader::file_bytes() const { return impl_->file.size(); }
uint64_t JsonlReader::position() const { return impl_->file.position(); }

bool JsonlReader::next(JsonlChunk& chunk) {
  Impl& s = *impl_;
  chunk.first_line = s.line;
  chunk.bytes.swap(s.carry);
  s.carry.clear();
  size_t searched = 0, end = std::string::npos;  // end: the last newline
  while (end == std::string::npos) {
    if (!s.read_more(chunk.bytes)) break;
    const size_t found = std::string_view(chunk.bytes).substr(searched).rfind('\n');
    if (found != std::string_view::npos) end = searched + found;
    searched = chunk.bytes.size();
    if (end == std::string::npos && searched > max_line) {
      throw Error(fmt::format("{}:{}", s.file.path(), s.line), fmt::format("a line of at most {} bytes", max_line),
                  "a longer one", "is it JSON lines (one object a line)?");
    }
  }
  if (end != std::string::npos) {
    s.carry.assign(chunk.bytes, end + 1);
    chunk.bytes.resize(end + 1);
  }
  if (s.at_start && chunk.bytes.starts_with("\xef\xbb\xbf")) chunk.bytes.erase(0, 3);
  s.at_start = false;
  s.line += std::count(chunk.bytes.begin(), chunk.bytes.end(), '\n');
  return !chunk.bytes.empty();
}

}  // namespace mm
