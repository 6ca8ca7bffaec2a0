// Shared by the tests of this folder: a scratch folder, compressed files, and a tiny tokenizer.
#pragma once

#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/fs.h"
#include "text/bpe_trainer.h"

namespace mm {

// A folder of its own for each test case; gone with the case.
class ScratchDir {
 public:
  ScratchDir() : dir_((std::filesystem::temp_directory_path() / "mm_data_XXXXXX").string()) {
    MM_CHECK(::mkdtemp(dir_.data()) != nullptr, "cannot make {}", dir_);
  }
  ~ScratchDir() { std::filesystem::remove_all(dir_); }
  ScratchDir(const ScratchDir&) = delete;
  ScratchDir& operator=(const ScratchDir&) = delete;
  std::string path(const std::string& name) const { return path_join(dir_, name); }
  std::string write(const std::string& name, const std::string& content) const {
    write_file(path(name), content);
    return path(name);
  }

 protected:
  std::string dir_;
};

inline std::string gzipped(const std::string& text) {
  z_stream z{};
  deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&z, text.size()) + 64, '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  z.avail_in = static_cast<uInt>(text.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  deflate(&z, Z_FINISH);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

inline std::string zstd_compressed(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

// MiniMind's special tokens, the 256 bytes, and merges learned from a few words.
inline const Tokenizer& tiny_tokenizer() {
  static const Tokenizer tokenizer = [] {
    BpeTrainerOptions options;
    options.vocab_size = 36 + 256 + 30;
    BpeTrainer trainer(options);
    trainer.feed({"assistant\nuser\nsystem\nhello world, hello you\n", "你好，世界。你好，你\n"});
    return trainer.train();
  }();
  return tokenizer;
}

}  // namespace mm
