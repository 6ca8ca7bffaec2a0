#include "data/dataset.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "base/rng.h"
#include "data/dataset_file.h"
#include "text/chat_template.h"

namespace mm {

struct TokenDataset::Store {
  MappedFile map;
  std::string memory;  // instead of the map
  DatasetSections sections;
  std::vector<std::string> paths;
  BadRows bad;
  int64_t truncated = 0;
  bool cached = false;

  int64_t begin(int64_t r) const { return static_cast<int64_t>(sections.offsets[r]); }
  int64_t len(int64_t r) const { return begin(r + 1) - begin(r); }
  uint32_t word(int64_t t) const {  // target flag at bit 31
    if (sections.footer.word_bytes == 2) {
      uint16_t w;
      std::memcpy(&w, sections.words + 2 * t, 2);
      return static_cast<uint32_t>(w & 0x8000u) << 16 | (w & 0x7fffu);
    }
    uint32_t w;
    std::memcpy(&w, sections.words + 4 * t, 4);
    return w;
  }
  int64_t count_targets(int64_t r) const {
    int64_t n = 0;
    for (int64_t t = begin(r); t < begin(r + 1); t++) n += word(t) >> 31;
    return n;
  }
};

namespace {

// The cache cannot be written: no reason to stop the run.
struct CacheUnwritable {
  std::string why;
};

uint64_t cache_key(const std::vector<std::string>& paths, const Tokenizer& tokenizer, const SampleOptions& o) {
  const std::string options = fmt::format("{} {} {} {} {} {:x}", kind_name(o.kind), o.max_len, o.empty_think_ratio,
                                          o.system_ratio, o.seed, tokenizer.fingerprint());
  uint64_t key = hash_bytes(options);
  for (const std::string& path : paths) {
    const MappedFile file(path);
    key = hash_bytes(file.text(), key);
  }
  return key;
}

ordered_json info_json(const std::vector<std::string>& paths, const BadRows& bad, int64_t truncated) {
  ordered_json list = ordered_json::array();
  for (const BadRow& b : bad.first) list.push_back({{"file", b.file}, {"line", b.line}, {"reason", b.reason}});
  return {{"paths", paths},
          {"truncated", truncated},
          {"rows_read", bad.rows},
          {"bad_rows", bad.bad},
          {"first_bad_rows", list}};
}

// Tokenizes everything into `sink`; the file (null: in memory) is committed at the end.
std::string write_dataset(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                          const SampleOptions& options, uint64_t key, AtomicFile* file) {
  DatasetSink sink(file);
  DatasetFooter footer{};
  footer.key = key;
  footer.word_bytes = tokenizer.vocab_size() <= 0x8000 ? 2 : 4;
  footer.files = paths.size();
  std::vector<uint64_t> offsets = {0}, files(paths.size() + 1, 0);
  std::vector<int64_t> lines;
  BadRows bad;
  int64_t truncated = 0;
  std::vector<char> words;
  const auto guard = [&](auto&& write) {  // a full disk is the cache's problem, a bad row is not
    try {
      write();
    } catch (const Error& e) {
      if (file != nullptr) throw CacheUnwritable{e.what()};
      throw;
    }
  };
  stream_samples(paths, &tokenizer, options, "tokenize", [&](StreamedRow& row) {
    bad.add(row);
    if (!row.error.empty()) return;
    const TokenSequence& s = row.sequences[0];
    words.resize(s.ids.size() * footer.word_bytes);
    for (size_t i = 0; i < s.ids.size(); i++) {
      const uint32_t id = static_cast<uint32_t>(s.ids[i]), flag = s.is_target[i];
      footer.targets += flag;
      if (footer.word_bytes == 2) {
        const uint16_t w = static_cast<uint16_t>(id | flag << 15);
        std::memcpy(words.data() + 2 * i, &w, 2);
      } else {
        const uint32_t w = id | flag << 31;
        std::memcpy(words.data() + 4 * i, &w, 4);
      }
    }
    guard([&] { sink.write(words.data(), words.size()); });
    truncated += s.full_len > static_cast<int64_t>(s.ids.size());
    offsets.push_back(offsets.back() + s.ids.size());
    lines.push_back(row.line);
    files[static_cast<size_t>(row.file) + 1]++;
  });
  bad.judge(paths, options.max_bad_share);
  for (size_t f = 1; f < files.size(); f++) files[f] += files[f - 1];
  footer.rows = lines.size();
  footer.tokens = offsets.back();
  guard([&] {
    const char zeros[8] = {};
    sink.write(zeros, (8 - sink.size() % 8) % 8);
    sink.write(offsets.data(), offsets.size() * 8);
    sink.write(lines.data(), lines.size() * 8);
    sink.write(files.data(), files.size() * 8);
    footer.content_hash = sink.hash_so_far();
    const std::string info =
        info_json(paths, bad, truncated).dump(-1, ' ', false, ordered_json::error_handler_t::replace);
    footer.info_bytes = info.size();
    footer.info_hash = hash_bytes(info);
    sink.write(info.data(), info.size());
    write_dataset_footer(sink, footer);
  });
  std::string memory;
  guard([&] {
    memory = sink.finish();
    if (file != nullptr) file->commit();
  });
  return memory;
}

}  // namespace

TokenDataset TokenDataset::build(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                                 const SampleOptions& options, const std::string& cache_dir) {
  if (paths.empty()) throw Error("data set", "at least one file", "none");
  if (options.kind != SampleKind::pretrain && options.kind != SampleKind::chat) {
    throw Error(paths[0], "text rows or conversations", fmt::format("{} rows", kind_name(options.kind)));
  }
  SampleEncoder check(tokenizer, options);  // a tokenizer that does not suit is an Error before any work
  if (options.kind == SampleKind::chat && !tokenizer.chat_template().empty() &&
      tokenizer.chat_template() != minimind_chat_template()) {
    log_warn("the tokenizer's chat template is not MiniMind's; conversations are rendered with MiniMind's");
  }
  const uint64_t key = cache_key(paths, tokenizer, options);
  const std::string cache = cache_dir.empty() ? "" : path_join(cache_dir, fmt::format("{:016x}.tokens", key));

  auto store = std::make_shared<Store>();
  const auto adopt = [&](bool cached) {
    const std::string_view bytes =
        cache.empty() || !store->memory.empty() ? std::string_view(store->memory) : store->map.text();
    store->sections = read_dataset_sections(bytes, cache.empty() ? "memory" : cache);
    if (store->sections.footer.key != key) throw Error(cache, "the cache of this data", "another one");
    const ordered_json& info = store->sections.info;
    store->cached = cached;
    store->paths = paths;  // the same bytes may have moved
    store->truncated = info.at("truncated").get<int64_t>();
    store->bad = {};
    store->bad.rows = info.at("rows_read").get<int64_t>();
    store->bad.bad = info.at("bad_rows").get<int64_t>();
    for (const auto& b : info.at("first_bad_rows")) {
      store->bad.first.push_back(
          {b.at("file").get<int64_t>(), b.at("line").get<int64_t>(), b.at("reason").get<std::string>()});
    }
  };
  if (!cache.empty() && file_exists(cache)) {
    try {
      store->map = MappedFile(cache);
      adopt(true);
    } catch (const std::exception& e) {
      log_warn("token cache is damaged and made again: {}", e.what());
      store = std::make_shared<Store>();
    }
    if (store->cached) store->bad.judge(paths, options.max_bad_share);
  }
  if (!store->cached && !cache.empty()) {
    try {
      std::optional<AtomicFile> file;
      try {
        file.emplace(cache);
      } catch (const Error& e) {
        throw CacheUnwritable{e.what()};
      }
      write_dataset(paths, tokenizer, options, key, &*file);
      store->map = MappedFile(cache);
      adopt(false);
    } catch (const CacheUnwritable& e) {
      log_warn("going on without token cache: {}", e.why);
      store->memory = write_dataset(paths, tokenizer, options, key, nullptr);
      adopt(false);
    }
  } else if (!store->cached) {
    store->memory = write_dataset(paths, tokenizer, options, key, nullptr);
    adopt(false);
  }
  return TokenDataset(store, nullptr);
}

TokenDataset::TokenDataset(std::shared_ptr<const Store> store, std::shared_ptr<const std::vector<uint32_t>> subset)
    : store_(std::move(store)), subset_(std::move(subset)) {
  const DatasetFooter& f = store_->sections.footer;
  fingerprint_ = f.content_hash;
  MM_CHECK(rows() < (int64_t{1} << 32), "{} rows", rows());
  for (int64_t i = 0; i < rows(); i++) max_row_len_ = std::max(max_row_len_, row_len(i));
  if (!subset_) {
    tokens_ = static_cast<int64_t>(f.tokens);
    targets_ = static_cast<int64_t>(f.targets);
    return;
  }
  for (const uint32_t r : *subset_) {
    tokens_ += store_->len(r);
    targets_ += store_->count_targets(r);
  }
  fingerprint_ =
      hash_bytes({reinterpret_cast<const char*>(subset_->data()), subset_->size() * sizeof(uint32_t)}, fingerprint_);
}

int64_t TokenDataset::stored(int64_t i) const {
  MM_CHECK(i >= 0 && i < rows(), "row {} of {}", i, rows());
  return subset_ ? (*subset_)[static_cast<size_t>(i)] : i;
}

int64_t TokenDataset::rows() const {
  return subset_ ? static_cast<int64_t>(subset_->size()) : static_cast<int64_t>(store_->sections.footer.rows);
}
int64_t TokenDataset::tokens() const { return tokens_; }
int64_t TokenDataset::targets() const { return targets_; }
int64_t TokenDataset::truncated() const { return store_->truncated; }
int64_t TokenDataset::max_row_len() const { return max_row_len_; }
int64_t TokenDataset::row_len(int64_t i) const { return store_->len(stored(i)); }
const std::vector<std::string>& TokenDataset::paths() const { return store_->paths; }
const BadRows& TokenDataset::bad_rows() const { return store_->bad; }
uint64_t TokenDataset::fingerprint() const { return fingerprint_; }
bool TokenDataset::from_cache() const { return store_->cached; }

void TokenDataset::row(int64_t i, std::vector<int32_t>& ids, std::vector<uint8_t>& is_target) const {
  const int64_t r = stored(i), begin = store_->begin(r), n = store_->len(r);
  ids.resize(static_cast<size_t>(n));
  is_target.resize(ids.size());
  for (int64_t t = 0; t < n; t++) {
    const uint32_t w = store_->word(begin + t);
    ids[static_cast<size_t>(t)] = static_cast<int32_t>(w & 0x7fffffffu);
    is_target[static_cast<size_t>(t)] = static_cast<uint8_t>(w >> 31);
  }
}

std::pair<int64_t, int64_t> TokenDataset::source(int64_t i) const {
  const int64_t r = stored(i);
  const uint64_t* files = store_->sections.files;
  const uint64_t* after = std::upper_bound(files, files + store_->sections.footer.files + 1, static_cast<uint64_t>(r));
  return {after - files - 1, store_->sections.lines[r]};
}

std::string TokenDataset::source_text(int64_t i) const {
  const auto [file, line] = source(i);
  return fmt::format("{}:{}", store_->paths[static_cast<size_t>(file)], line);
}

std::pair<TokenDataset, TokenDataset> TokenDataset::split(double valid_share, uint64_t seed) const {
  MM_CHECK(valid_share >= 0 && valid_share <= 1);
  const int64_t n = rows();
  int64_t n_valid = static_cast<int64_t>(std::llround(valid_share * static_cast<double>(n)));
  if (valid_share > 0 && valid_share < 1 && n >= 2) n_valid = std::clamp(n_valid, int64_t{1}, n - 1);
  constexpr uint64_t stream = 0x73706c6974;  // "split"
  std::vector<std::pair<uint64_t, uint32_t>> order;
  order.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++) {
    const auto r = philox4x32(seed, stream, static_cast<uint64_t>(i));
    order.emplace_back(uint64_t{r[0]} << 32 | r[1], static_cast<uint32_t>(i));
  }
  std::nth_element(order.begin(), order.begin() + n_valid, order.end());
  std::vector<uint8_t> is_valid(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < n_valid; i++) is_valid[order[static_cast<size_t>(i)].second] = 1;
  auto train = std::make_shared<std::vector<uint32_t>>(), valid = std::make_shared<std::vector<uint32_t>>();
  for (int64_t i = 0; i < n; i++) {
    (is_valid[static_cast<size_t>(i)] != 0 ? valid : train)->push_back(static_cast<uint32_t>(stored(i)));
  }
  return {TokenDataset(store_, train), TokenDataset(store_, valid)};
}

}  // namespace mm
