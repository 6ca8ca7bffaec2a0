#include "text/bpe_trainer.h"

#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "base/log.h"
#include "base/thread_team.h"
#include "text/bpe_merge_loop.h"
#include "text/chat_template.h"
#include "text/pretokenizer.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"
#include "text/word_counts.h"

namespace mm {

namespace {

constexpr size_t kShards = 64;             // of the global table, by the hash's top bits: one thread each, no locks
constexpr size_t kChunkBytes = 512 << 10;  // of texts, counted by one thread at a time
constexpr size_t kGroupBytes = 32 << 20;   // of texts, counted before the chunks' tables are merged into the shards
constexpr size_t shard_of(uint64_t hash) { return hash >> 58; }
static_assert(size_t{1} << (64 - 58) == kShards);

}  // namespace

std::vector<SpecialToken> chatml_special_tokens() { return {{"<|endoftext|>"}, {"<|im_start|>"}, {"<|im_end|>"}}; }

std::vector<SpecialToken> minimind_special_tokens() {
  std::vector<SpecialToken> tokens;
  for (const char* name :
       {"<|endoftext|>",        "<|im_start|>",   "<|im_end|>",     "<|object_ref_start|>", "<|object_ref_end|>",
        "<|box_start|>",        "<|box_end|>",    "<|quad_start|>", "<|quad_end|>",         "<|vision_start|>",
        "<|vision_end|>",       "<|vision_pad|>", "<|image_pad|>",  "<|video_pad|>",        "<|audio_start|>",
        "<|audio_end|>",        "<|audio_pad|>",  "<tts_pad>",      "<tts_text_bos>",       "<tts_text_eod>",
        "<tts_text_bos_single>"}) {
    tokens.push_back({name, true});
  }
  for (const char* name :
       {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}) {
    tokens.push_back({name, false});
  }
  for (int i = 1; i <= 9; i++) tokens.push_back({fmt::format("<|buffer{}|>", i), false});
  return tokens;
}

struct BpeTrainer::Impl {
  BpeTrainerOptions options;
  PreTokenizer pre;
  std::vector<WordCounts> shards{kShards};
  int64_t dropped = 0;

  void count_group(const std::vector<std::string_view>& texts, size_t begin, size_t end) {
    std::vector<size_t> starts;  // of the chunks, then the end
    size_t bytes = kChunkBytes;
    for (size_t i = begin; i < end; i++) {
      if (bytes >= kChunkBytes) {
        starts.push_back(i);
        bytes = 0;
      }
      bytes += texts[i].size();
    }
    const size_t chunks = starts.size();
    starts.push_back(end);

    std::vector<WordCounts> counts(chunks);
    std::vector<std::vector<uint32_t>> order(chunks);  // entries sorted by shard
    std::vector<std::array<uint32_t, kShards + 1>> bounds(chunks);
    parallel_dynamic(static_cast<int64_t>(chunks), [&](int64_t c, int) {
      const auto chunk = static_cast<size_t>(c);
      WordCounts& local = counts[chunk];
      for (size_t i = starts[chunk]; i < starts[chunk + 1]; i++) {
        pre.for_each_word(texts[i], [&](std::string_view w) { local.add(w, hash_word(w), 1); });
      }
      auto& bound = bounds[chunk];
      bound.fill(0);
      for (const auto& e : local.entries()) bound[shard_of(e.hash) + 1]++;
      for (size_t s = 0; s < kShards; s++) bound[s + 1] += bound[s];
      auto next = bound;
      order[chunk].resize(local.entries().size());
      for (size_t i = 0; i < local.entries().size(); i++) {
        order[chunk][next[shard_of(local.entries()[i].hash)]++] = static_cast<uint32_t>(i);
      }
    });
    parallel_dynamic(kShards, [&](int64_t s, int) {
      const auto shard = static_cast<size_t>(s);
      for (size_t c = 0; c < chunks; c++) {
        for (uint32_t k = bounds[c][shard]; k < bounds[c][shard + 1]; k++) {
          const auto& e = counts[c].entries()[order[c][k]];
          shards[shard].add(counts[c].word(e), e.hash, e.count);
        }
      }
    });
    keep_bound();
  }

  void keep_bound() {
    for (int64_t limit = 1; cost() > options.max_word_bytes; limit *= 2) {
      std::vector<int64_t> gone(kShards);
      parallel_dynamic(kShards, [&](int64_t s, int) {
        gone[static_cast<size_t>(s)] = shards[static_cast<size_t>(s)].drop_rare(limit);
      });
      for (const int64_t g : gone) dropped += g;
      log_warn("tokenizer training: more than {} MiB of distinct words; dropped those seen at most {} times",
               options.max_word_bytes >> 20, limit);
    }
  }

  int64_t cost() const {
    int64_t sum = 0;
    for (const WordCounts& s : shards) sum += s.cost();
    return sum;
  }
};

BpeTrainer::BpeTrainer(BpeTrainerOptions options) : impl_(std::make_unique<Impl>()) {
  std::unordered_map<std::string, int> seen;
  for (const SpecialToken& t : options.special_tokens) {
    if (t.content.empty()) throw Error("special tokens", "at least one character each", "an empty one");
    if (seen[t.content]++ > 0) throw Error("special tokens", "each once", "\"" + t.content + "\" twice");
  }
  const auto least = static_cast<int64_t>(options.special_tokens.size()) + 256;
  if (options.vocab_size < least) {
    throw Error("vocabulary size", fmt::format("at least {} ({} special tokens and 256 bytes)", least, least - 256),
                std::to_string(options.vocab_size));
  }
  impl_->options = std::move(options);
}

BpeTrainer::~BpeTrainer() = default;

void BpeTrainer::feed(const std::vector<std::string_view>& texts) {
  size_t begin = 0, bytes = 0;
  for (size_t i = 0; i < texts.size(); i++) {
    bytes += texts[i].size();
    if (bytes >= kGroupBytes || i + 1 == texts.size()) {
      impl_->count_group(texts, begin, i + 1);
      begin = i + 1;
      bytes = 0;
    }
  }
}

int64_t BpeTrainer::distinct_words() const {
  int64_t n = 0;
  for (const WordCounts& s : impl_->shards) n += static_cast<int64_t>(s.entries().size());
  return n;
}

int64_t BpeTrainer::dropped_words() const { return impl_->dropped; }

Tokenizer BpeTrainer::train() {
  const BpeTrainerOptions& options = impl_->options;
  if (distinct_words() == 0) throw Error("tokenizer training", "at least one text that is not empty", "none");

  TokenizerSpec spec;
  for (const SpecialToken& t : options.special_tokens) {
    AddedToken added;
    added.content = t.content;
    added.special = t.special;
    added.id = static_cast<int32_t>(spec.tokens.size());
    spec.tokens.push_back(t.content);
    spec.added.push_back(std::move(added));
  }
  // The bytes in the order of their printable characters.
  std::vector<uint8_t> bytes(256);
  for (int b = 0; b < 256; b++) bytes[static_cast<size_t>(b)] = static_cast<uint8_t>(b);
  std::sort(bytes.begin(), bytes.end(),
            [](uint8_t x, uint8_t y) { return printable_of_byte(x) < printable_of_byte(y); });
  std::array<int32_t, 256> byte_ids{};
  for (const uint8_t b : bytes) {
    std::string token;
    append_utf8(printable_of_byte(b), token);
    const auto same = std::find(spec.tokens.begin(), spec.tokens.end(), token);
    byte_ids[b] = static_cast<int32_t>(same - spec.tokens.begin());
    if (same == spec.tokens.end()) spec.tokens.push_back(token);
  }

  MergeLoop loop(byte_ids, spec.tokens);
  for (WordCounts& shard : impl_->shards) {
    for (const auto& e : shard.entries()) loop.add_word(shard.word(e), e.count);
    shard = WordCounts();  // its memory is needed from here on
  }
  loop.run(options.vocab_size, options.min_frequency);
  spec.tokens = loop.tokens();
  spec.merges = loop.merges();

  const auto name = [&](const char* content) {
    return std::any_of(spec.added.begin(), spec.added.end(), [&](const AddedToken& t) { return t.content == content; })
               ? std::string(content)
               : std::string();
  };
  spec.bos = name("<|im_start|>");
  spec.eos = name("<|im_end|>");
  spec.pad = spec.unk = name("<|endoftext|>");
  spec.chat_template = minimind_chat_template();
  return Tokenizer::from_spec(spec);
}

}  // namespace mm
