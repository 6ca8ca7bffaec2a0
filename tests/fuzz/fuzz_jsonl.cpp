// Hostile data sets: the first byte chooses kind and chunk size, the rest is the file, plain or compressed. Every row
// is either encoded, with a mask as long as its ids, or an Error; the lines do not depend on the chunk size.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "data/jsonl.h"
#include "data/samples.h"
#include "text/bpe_trainer.h"

static const mm::Tokenizer& tokenizer() {
  static const mm::Tokenizer t = [] {
    mm::BpeTrainerOptions options;
    options.vocab_size = 36 + 256 + 10;
    mm::BpeTrainer trainer(options);
    trainer.feed({"assistant\nuser\nsystem\n"});
    return trainer.train();
  }();
  return t;
}

// A file in memory that the reader can open.
static const std::string& memory_file(const uint8_t* data, size_t size) {
  static const int fd = ::memfd_create("fuzz", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (fd < 0 || ::ftruncate(fd, 0) != 0 || ::pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) std::abort();
  return path;
}

static std::vector<std::string> read_lines(const std::string& path, size_t chunk_bytes) {
  std::vector<std::string> lines;
  try {
    mm::JsonlReader reader(path, chunk_bytes);
    mm::JsonlChunk chunk;
    size_t total = 0;
    while (total < (1 << 20) && reader.next(chunk)) {  // small files may unpack to gigabytes
      total += chunk.bytes.size();
      mm::for_each_line(chunk, [&](int64_t n, std::string_view line) {
        lines.push_back(std::to_string(n) + ":" + std::string(line));
      });
    }
    if (total >= (1 << 20)) lines.clear();
  } catch (const mm::Error&) {
    lines.clear();
  }
  return lines;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  mm::SampleOptions options;
  options.kind = static_cast<mm::SampleKind>(data[0] % 4);
  options.max_len = 40;
  const std::string& path = memory_file(data + 1, size - 1);
  const auto lines = read_lines(path, 1 + data[0] / 4);
  if (lines != read_lines(path, mm::JsonlReader::default_chunk)) std::abort();
  const mm::SampleEncoder encoder(tokenizer(), options);
  mm::SampleParser parser;
  for (const std::string& line : lines) {
    try {
      const auto sample = parser.parse(std::string_view(line).substr(line.find(':') + 1), options.kind);
      for (const auto& s : encoder.encode(sample, 1)) {
        if (s.ids.empty() || s.ids.size() > 40 || s.is_target.size() != s.ids.size() || s.is_target[0] != 0)
          std::abort();
      }
    } catch (const mm::Error&) {
    }
  }
  return 0;
}
