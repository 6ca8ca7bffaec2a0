// The cache file of a TokenDataset, also its form in memory. Written front to back, read from the footer:
//   words    one a token: the id, with the highest bit set where the token is a target; 2 bytes if all ids fit 15 bits,
//   else 4 (zeros to a multiple of 8) offsets  u64[rows + 1]  first word of each row lines    i64[rows]      line
//   number of each row files    u64[files + 1] first row of each file info     JSON: paths, bad rows, truncated rows
//   footer   DatasetFooter
// Little endian, as every machine this program runs on.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/fs.h"
#include "base/json.h"

namespace mm {

struct DatasetFooter {
  char magic[8];
  uint64_t key;  // what the cache was made from
  uint64_t word_bytes, rows, files, tokens, targets, info_bytes;
  uint64_t content_hash;  // of everything before info
  uint64_t info_hash;
  uint64_t footer_hash;  // of the fields above
};

// Where the bytes go: an atomic file, or a string. Hashes what passes in blocks of 1 MiB.
class DatasetSink {
 public:
  explicit DatasetSink(AtomicFile* file) : file_(file) {}  // null: in memory
  void write(const void* data, size_t n);
  uint64_t hash_so_far();  // ends the current block
  std::string finish();    // the bytes, if in memory
  uint64_t size() const { return size_; }

 private:
  void end_block();
  AtomicFile* file_;
  std::string block_, memory_;
  uint64_t hash_ = 0xcbf29ce484222325ull, size_ = 0;
};

// The sections of a complete file; pointers into its bytes.
struct DatasetSections {
  DatasetFooter footer{};
  const char* words = nullptr;
  const uint64_t* offsets = nullptr;
  const int64_t* lines = nullptr;
  const uint64_t* files = nullptr;
  ordered_json info;
};

// Checks sizes, hashes and structure; Error naming `where` otherwise. `bytes` must be aligned to 8.
DatasetSections read_dataset_sections(std::string_view bytes, const std::string& where);
// Fills magic and footer_hash and writes it.
void write_dataset_footer(DatasetSink& sink, DatasetFooter footer);

}  // namespace mm
