// Streams the lines of a .jsonl file, plain or compressed with gzip or zstd, in chunks of whole lines.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace mm {

struct JsonlChunk {
  std::string bytes;       // whole lines; the last one of a file may lack its newline
  int64_t first_line = 1;  // number of the first line in the file, from 1
};

// Reads one file from start to end in bounded memory: one chunk, the beginning of the next, and the decompressor's
// window. The compression is recognised by the file's first bytes, whatever its name. A byte order mark is dropped. One
// thread.
class JsonlReader {
 public:
  static constexpr size_t default_chunk = 256 << 10;
  static constexpr size_t max_line = 64 << 20;

  // Error if the file cannot be opened.
  explicit JsonlReader(const std::string& path, size_t chunk_bytes = default_chunk);
  ~JsonlReader();
  JsonlReader(JsonlReader&&) noexcept;

  // False at the end of the file. Error for a damaged or truncated compressed file and for a line above max_line.
  bool next(JsonlChunk& chunk);
  uint64_t file_bytes() const;  // as stored, for progress
  uint64_t position() const;    // bytes of the stored file read so far

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// f(line number, line) for each line of the chunk that is not blank; line ends (\n, \r\n) are removed.
template <class F>
void for_each_line(const JsonlChunk& chunk, F&& f) {
  std::string_view rest = chunk.bytes;
  for (int64_t number = chunk.first_line; !rest.empty(); number++) {
    const size_t end = rest.find('\n');
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    if (line.back() == '\r') line.remove_suffix(1);
    f(number, line);
  }
}

}  // namespace mm
