#include "text/tokenizer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/thread_team.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"

namespace mm {

namespace {

// Ids of short words, direct mapped; one a thread, filled by the tokenizer that the thread used last.
struct WordCache {
  static constexpr size_t kMaxWord = 24, kMaxIds = 9, kSlots = 8192;
  struct alignas(64) Slot {
    uint64_t a, b, c;  // with `length`, equal exactly for equal words
    uint8_t length, n_ids;
    int32_t ids[kMaxIds];
  };
  static_assert(sizeof(Slot) == 64);

  std::vector<Slot> slots;
  uint64_t owner = 0;

  void take(uint64_t tokenizer) {
    if (owner == tokenizer) return;
    slots.assign(kSlots, Slot{});
    owner = tokenizer;
  }
};

template <class T>
uint64_t load(const char* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The word as three integers (overlapping loads); words of one length differ in at least one of them.
inline void word_key(const char* p, size_t n, uint64_t& a, uint64_t& b, uint64_t& c) {
  b = c = 0;
  if (n >= 8) {
    a = load<uint64_t>(p);
    b = load<uint64_t>(p + n - 8);
    if (n > 16) c = load<uint64_t>(p + 8);
  } else if (n >= 4) {
    a = load<uint32_t>(p) | load<uint32_t>(p + n - 4) << 32;
  } else {
    a = load<uint8_t>(p) | load<uint8_t>(p + n / 2) << 8 | load<uint8_t>(p + n - 1) << 16;
  }
}

std::array<int32_t, 256> find_byte_ids(const std::unordered_map<std::string_view, int32_t>& ids) {
  std::array<int32_t, 256> out{};
  for (int b = 0; b < 256; b++) {
    std::string token;
    append_utf8(printable_of_byte(static_cast<uint8_t>(b)), token);
    const auto it = ids.find(token);
    MM_CHECK(it != ids.end(), "byte {} has no token", b);
    out[static_cast<size_t>(b)] = it->second;
  }
  return out;
}

std::unordered_map<std::string_view, int32_t> index_tokens(const TokenizerSpec& spec) {
  std::unordered_map<std::string_view, int32_t> ids;
  ids.reserve(spec.tokens.size() * 2);
  for (size_t i = 0; i < spec.tokens.size(); i++) {
    if (!spec.tokens[i].empty()) ids.emplace(spec.tokens[i], static_cast<int32_t>(i));
  }
  return ids;
}

std::vector<AddedToken> tokens_with(const std::vector<AddedToken>& added, bool normalized) {
  std::vector<AddedToken> out;
  std::copy_if(added.begin(), added.end(), std::back_inserter(out),
               [&](const AddedToken& t) { return t.normalized == normalized; });
  return out;
}

std::atomic<uint64_t> g_next_owner{1};

}  // namespace

struct Tokenizer::Impl {
  enum Flag : uint8_t { kAdded = 1, kSpecial = 2 };

  TokenizerSpec spec;
  std::string tokenizer_json, config_json;
  std::unordered_map<std::string_view, int32_t> ids;  // views into spec.tokens
  std::vector<std::string> bytes;                     // by id
  std::vector<uint8_t> flags;                         // by id
  BpeMerger merger;
  AddedTokenMatcher plain, normalized;
  PreTokenizer pre;
  int32_t bos = -1, eos = -1, pad = -1;
  uint64_t owner = g_next_owner++;  // key of the threads' word caches; never reused
  uint64_t fingerprint = 0;

  explicit Impl(TokenizerSpec s)
      : spec(std::move(s)),
        ids(index_tokens(spec)),
        merger(spec.merges, find_byte_ids(ids)),
        plain(tokens_with(spec.added, false)),
        normalized(tokens_with(spec.added, true)) {
    bytes.reserve(spec.tokens.size());
    for (const std::string& t : spec.tokens) bytes.push_back(printable_to_bytes(t));
    flags.assign(spec.tokens.size(), 0);
    for (const AddedToken& t : spec.added) flags[static_cast<size_t>(t.id)] = t.special ? kAdded | kSpecial : kAdded;
    const auto id_of = [&](const std::string& content) {
      const auto it = ids.find(content);
      return it == ids.end() ? -1 : it->second;
    };
    bos = id_of(spec.bos);
    eos = id_of(spec.eos);
    pad = id_of(spec.pad);
  }

  bool has_flag(int32_t id, Flag flag) const {
    return id >= 0 && static_cast<size_t>(id) < flags.size() && (flags[static_cast<size_t>(id)] & flag) != 0;
  }

  void encode_text(std::string_view text, WordCache& cache, std::vector<int32_t>& out) const {
    pre.for_each_word(text, [&](std::string_view word) {
      if (word.size() > WordCache::kMaxWord) {
        merger.encode_word(word, out);
        return;
      }
      uint64_t a, b, c;
      word_key(word.data(), word.size(), a, b, c);
      const uint64_t h =
          (a * 0x9E3779B97F4A7C15ull ^ b * 0xC2B2AE3D27D4EB4Full ^ c * 0x165667B19E3779F9ull) + word.size();
      WordCache::Slot& slot = cache.slots[(h ^ h >> 29) * 0xBF58476D1CE4E5B9ull >> 51];
      static_assert(WordCache::kSlots == size_t{1} << (64 - 51));
      if (slot.a == a && slot.b == b && slot.c == c && slot.length == word.size()) {
        out.insert(out.end(), slot.ids, slot.ids + slot.n_ids);
        return;
      }
      const size_t before = out.size();
      merger.encode_word(word, out);
      const size_t n = out.size() - before;
      if (n > WordCache::kMaxIds) return;
      slot.a = a;
      slot.b = b;
      slot.c = c;
      slot.length = static_cast<uint8_t>(word.size());
      slot.n_ids = static_cast<uint8_t>(n);
      std::copy(out.begin() + static_cast<ptrdiff_t>(before), out.end(), slot.ids);
    });
  }

  void encode(std::string_view text, std::vector<int32_t>& out) const {
    static thread_local WordCache cache;
    cache.take(owner);
    const auto on_token = [&](int32_t id) { out.push_back(id); };
    const auto on_text = [&](std::string_view part) { encode_text(part, cache, out); };
    const auto on_outer = [&](std::string_view part) {
      if (normalized.empty()) on_text(part);
      else normalized.split(part, on_text, on_token);
    };
    if (plain.empty()) on_outer(text);
    else plain.split(text, on_outer, on_token);
  }
};

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, std::string_view config_json,
                               const std::string& where) {
  auto impl = std::make_shared<Impl>(parse_tokenizer(tokenizer_json, config_json, where));
  impl->tokenizer_json = tokenizer_json;
  impl->config_json = config_json.empty() ? write_tokenizer_config(impl->spec) : std::string(config_json);
  impl->fingerprint = hash_bytes(impl->config_json, hash_bytes(impl->tokenizer_json));
  return Tokenizer(std::move(impl));
}

Tokenizer Tokenizer::from_spec(const TokenizerSpec& spec) {
  return from_json(write_tokenizer_json(spec), write_tokenizer_config(spec), "new tokenizer");
}

Tokenizer Tokenizer::load(const std::string& path) {
  const bool folder = dir_exists(path);
  const std::string file = folder ? path_join(path, "tokenizer.json") : path;
  if (folder && !file_exists(file)) {
    throw Error(path, "a folder with tokenizer.json", "none", "train one with `minimind tokenizer train`");
  }
  const size_t slash = file.rfind('/');
  const std::string dir = slash == std::string::npos ? "" : file.substr(0, slash + 1);
  std::string config = file_exists(dir + "tokenizer_config.json") ? read_file(dir + "tokenizer_config.json") : "";
  if (file_exists(dir + "chat_template.jinja")) {  // where newer transformers keep the template; it wins there too
    ordered_json fields = config.empty() ? ordered_json::object() : parse_json(config, dir + "tokenizer_config.json");
    if (!fields.is_object()) throw Error(dir + "tokenizer_config.json", "a JSON object", json_type_name(fields));
    fields["chat_template"] = read_file(dir + "chat_template.jinja", 16 << 20);
    try {
      config = fields.dump(2);
    } catch (const json::exception&) {
      throw Error(dir + "chat_template.jinja", "UTF-8 text", "invalid bytes");
    }
  }
  return from_json(read_file(file), config, file);
}

void Tokenizer::save(const std::string& dir) const {
  make_dirs(dir);
  write_file(path_join(dir, "tokenizer.json"), impl_->tokenizer_json);
  write_file(path_join(dir, "tokenizer_config.json"), impl_->config_json);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  encode_append(text, ids);
  return ids;
}

void Tokenizer::encode_append(std::string_view text, std::vector<int32_t>& ids) const { impl_->encode(text, ids); }

std::vector<std::vector<int32_t>> Tokenizer::encode_batch(std::span<const std::string_view> texts) const {
  std::vector<std::vector<int32_t>> out(texts.size());
  constexpr int64_t kGroup = 16;  // texts handed out together
  const auto n = static_cast<int64_t>(texts.size());
  parallel_dynamic((n + kGroup - 1) / kGroup, [&](int64_t group, int) {
    std::vector<int32_t> ids;
    for (int64_t i = group * kGroup; i < std::min(n, (group + 1) * kGroup); i++) {
      ids.clear();
      impl_->encode(texts[static_cast<size_t>(i)], ids);
      out[static_cast<size_t>(i)].assign(ids.begin(), ids.end());
    }
  });
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special, bool raw) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!skip_special || !is_special(id)) bytes += token_bytes(id);
  }
  if (raw) return bytes;
  std::string out;
  out.reserve(bytes.size());
  append_lossy_utf8(bytes, true, out);
  return out;
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= impl_->bytes.size()) return {};
  return impl_->bytes[static_cast<size_t>(id)];
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->spec.tokens.size()); }
int32_t Tokenizer::bos_id() const { return impl_->bos; }
int32_t Tokenizer::eos_id() const { return impl_->eos; }
int32_t Tokenizer::pad_id() const { return impl_->pad; }
bool Tokenizer::is_special(int32_t id) const { return impl_->has_flag(id, Impl::kSpecial); }
bool Tokenizer::is_added(int32_t id) const { return impl_->has_flag(id, Impl::kAdded); }

std::optional<int32_t> Tokenizer::token_to_id(std::string_view content) const {
  const auto it = impl_->ids.find(content);
  if (it == impl_->ids.end()) return std::nullopt;
  return it->second;
}

const std::string& Tokenizer::chat_template() const { return impl_->spec.chat_template; }
uint64_t Tokenizer::fingerprint() const { return impl_->fingerprint; }

}  // namespace mm
