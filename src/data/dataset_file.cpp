#include "data/dataset_file.h"

#include <cstring>

#include "base/error.h"

namespace mm {

static constexpr char dataset_magic[9] = "MMTOK001";
static constexpr size_t hash_block = 1 << 20;

void DatasetSink::end_block() {
  if (block_.empty()) return;
  hash_ = hash_bytes(block_, hash_);
  if (file_ != nullptr) file_->write(block_);
  else memory_ += block_;
  block_.clear();
}

void DatasetSink::write(const void* data, size_t n) {
  const char* p = static_cast<const char*>(data);
  size_ += n;
  while (n > 0) {
    const size_t k = std::min(n, hash_block - block_.size());
    block_.append(p, k);
    p += k;
    n -= k;
    if (block_.size() == hash_block) end_block();
  }
}

uint64_t DatasetSink::hash_so_far() {
  end_block();
  return hash_;
}

std::string DatasetSink::finish() {
  end_block();
  return std::move(memory_);
}

static uint64_t hash_blocks(std::string_view bytes) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (size_t at = 0; at < bytes.size(); at += hash_block) h = hash_bytes(bytes.substr(at, hash_block), h);
  return h;
}

static uint64_t footer_hash(const DatasetFooter& f) {
  return hash_bytes({reinterpret_cast<const char*>(&f), offsetof(DatasetFooter, footer_hash)});
}

void write_dataset_footer(DatasetSink& sink, DatasetFooter footer) {
  std::memcpy(footer.magic, dataset_magic, 8);
  footer.footer_hash = footer_hash(footer);
  sink.write(&footer, sizeof footer);
}

DatasetSections read_dataset_sections(std::string_view bytes, const std::string& where) {
  DatasetSections s;
  const auto damaged = [&](const char* what) { return Error(where, "a complete token cache", what); };
  if (bytes.size() < sizeof s.footer) throw damaged("too short a file");
  std::memcpy(&s.footer, bytes.data() + bytes.size() - sizeof s.footer, sizeof s.footer);
  const DatasetFooter& f = s.footer;
  if (std::memcmp(f.magic, dataset_magic, 8) != 0) throw damaged("no footer at its end");
  // Also guards against overflow below: with the right hash the sizes are ours.
  if (f.footer_hash != footer_hash(f)) throw damaged("a damaged footer");
  const uint64_t word_section = (f.tokens * f.word_bytes + 7) / 8 * 8;
  const uint64_t content = word_section + 8 * (f.rows + 1) + 8 * f.rows + 8 * (f.files + 1);
  if (content + f.info_bytes + sizeof f != bytes.size()) throw damaged("another size than its footer says");
  if (hash_blocks(bytes.substr(0, content)) != f.content_hash) throw damaged("damaged tokens");
  const std::string_view info = bytes.substr(content, f.info_bytes);
  if (hash_bytes(info) != f.info_hash) throw damaged("damaged information");
  s.words = bytes.data();
  s.offsets = reinterpret_cast<const uint64_t*>(bytes.data() + word_section);
  s.lines = reinterpret_cast<const int64_t*>(s.offsets + f.rows + 1);
  s.files = reinterpret_cast<const uint64_t*>(s.lines + f.rows);
  s.info = parse_json(info, where);
  return s;
}

}  // namespace mm
