// Samples to text and ids, as MiniMind's dataset classes make them.
#include "data/samples.h"

#include <algorithm>

#include "base/error.h"
#include "base/rng.h"
#include "text/chat_template.h"

namespace mm {

static const std::string empty_think = "<think>\n\n</think>\n\n";
static const std::string turn_begin = "<|im_start|>assistant\n", turn_end = "<|im_end|>\n";

SampleOptions SampleOptions::evaluation(SampleKind kind, int64_t max_len) {
  SampleOptions o;
  o.kind = kind;
  o.max_len = max_len;
  o.empty_think_ratio = o.system_ratio = 0;
  return o;
}

const std::vector<std::string>& minimind_system_prompts() {
  static const std::vector<std::string> prompts = {
      "你是一个知识丰富的AI，尽力为用户提供准确的信息。",
      "你是minimind，一个小巧但有用的语言模型。",
      "你是一个专业的AI助手，请提供有价值的回答。",
      "你是minimind，请尽力帮助用户解决问题。",
      "你是一个可靠的AI，请给出准确的回答。",
      "You are a helpful AI assistant.",
      "You are minimind, a lightweight intelligent assistant.",
      "You are a friendly chatbot. Please answer the user's questions carefully.",
      "You are a knowledgeable AI. Try your best to provide accurate information.",
      "You are minimind, a small but useful language model."};
  return prompts;
}

// The row's random numbers: [0] add a system message?, [1] which, [2] keep empty thinking?, [3] the same, rejected
// side.
static std::array<uint32_t, 4> draws(uint64_t seed, uint64_t row) {
  constexpr uint64_t stream = 0x73616d706c65;  // "sample"
  return philox4x32(seed, stream, row);
}

static void handle_empty_think(std::string& text, double keep_ratio, uint32_t draw) {
  if (to_unit_float(draw) < keep_ratio) return;
  for (size_t at = text.find(empty_think); at != std::string::npos; at = text.find(empty_think, at)) {
    text.erase(at, empty_think.size());
  }
}

std::vector<std::string> render_sample(const Sample& s, const SampleOptions& o, uint64_t row) {
  if (s.kind == SampleKind::pretrain) return {s.text};
  const auto draw = draws(o.seed, row);
  if (s.kind == SampleKind::preference) {
    std::vector<std::string> out = {render_chat(s.messages, nullptr, {}, "chosen"),
                                    render_chat(s.rejected, nullptr, {}, "rejected")};
    for (size_t i = 0; i < 2; i++) handle_empty_think(out[i], o.empty_think_ratio, draw[2 + i]);
    return out;
  }
  ordered_json messages = s.messages;
  if (!s.has_tools && messages[0].value("role", ordered_json()) != "system" &&
      to_unit_float(draw[0]) < o.system_ratio) {
    const auto& prompts = minimind_system_prompts();
    ordered_json system = {{"role", "system"}, {"content", prompts[draw[1] * prompts.size() >> 32]}};
    messages.insert(messages.begin(), std::move(system));
  }
  ChatOptions chat;
  if (s.kind == SampleKind::prompt) {
    messages.erase(messages.size() - 1);
    chat.add_generation_prompt = true;
    return {render_chat(messages, s.tools, chat, "conversations")};
  }
  std::string text = render_chat(messages, s.tools, chat, "conversations");
  handle_empty_think(text, o.empty_think_ratio, draw[2]);
  return {text};
}

SampleEncoder::SampleEncoder(const Tokenizer& tokenizer, const SampleOptions& options)
    : tokenizer_(tokenizer), options_(options) {
  if (options.max_len < 2) throw Error("max_len", "at least 2", std::to_string(options.max_len));
  if (options.kind == SampleKind::pretrain) {
    if (tokenizer.bos_id() < 0 || tokenizer.eos_id() < 0) {
      throw Error("tokenizer", "beginning and end tokens (bos_token, eos_token)", "none",
                  "see `minimind tokenizer train`");
    }
    return;
  }
  for (const char* marker : {"<|im_start|>", "<|im_end|>"}) {
    if (tokenizer.encode(marker).size() != 1) {
      throw Error("tokenizer", fmt::format("{} as one token, for conversations", marker), "several tokens",
                  "see `minimind tokenizer train`");
    }
  }
  turn_begin_ = tokenizer.encode(turn_begin);
  turn_end_ = tokenizer.encode(turn_end);
}

TokenSequence SampleEncoder::encode_chat(const std::string& text) const {
  TokenSequence out;
  out.ids = tokenizer_.encode(text);
  out.full_len = static_cast<int64_t>(out.ids.size());
  const auto& ids = out.ids;
  if (out.full_len > options_.max_len) out.ids.resize(static_cast<size_t>(options_.max_len));
  out.is_target.assign(ids.size(), 0);
  // On the cut ids, as MiniMind: a turn whose end is cut off counts to the end of the row.
  for (auto at = ids.begin();;) {
    const auto begin = std::search(at, ids.end(), turn_begin_.begin(), turn_begin_.end());
    if (begin == ids.end()) break;
    const auto first = begin + static_cast<std::ptrdiff_t>(turn_begin_.size());
    const auto end = std::search(first, ids.end(), turn_end_.begin(), turn_end_.end());
    at = end == ids.end() ? end : end + static_cast<std::ptrdiff_t>(turn_end_.size());
    std::fill(out.is_target.begin() + (first - ids.begin()), out.is_target.begin() + (at - ids.begin()), 1);
  }
  return out;
}

std::vector<TokenSequence> SampleEncoder::encode(const Sample& sample, uint64_t row) const {
  MM_CHECK(sample.kind == options_.kind);
  const size_t max_len = static_cast<size_t>(options_.max_len);
  std::vector<TokenSequence> out;
  if (sample.kind == SampleKind::pretrain) {
    TokenSequence& s = out.emplace_back();
    s.ids.push_back(tokenizer_.bos_id());
    tokenizer_.encode_append(sample.text, s.ids);
    s.full_len = static_cast<int64_t>(s.ids.size()) + 1;
    if (s.ids.size() > max_len - 1) s.ids.resize(max_len - 1);
    s.ids.push_back(tokenizer_.eos_id());
    s.is_target.assign(s.ids.size(), 1);
    s.is_target[0] = 0;
    // MiniMind masks labels by the padding id, so padding ids inside a text are not learned either. (Where a tokenizer
    // pads with its end token that would unlearn stopping: there they are.)
    const int32_t pad = tokenizer_.pad_id();
    for (size_t i = 1; pad >= 0 && pad != tokenizer_.eos_id() && i < s.ids.size(); i++)
      s.is_target[i] = s.ids[i] != pad;
    return out;
  }
  for (const std::string& text : render_sample(sample, options_, row)) {
    if (sample.kind != SampleKind::prompt) {
      out.push_back(encode_chat(text));
      continue;
    }
    TokenSequence& s = out.emplace_back();
    s.ids = tokenizer_.encode(text);
    s.full_len = static_cast<int64_t>(s.ids.size());
    if (s.ids.size() > max_len) s.ids.erase(s.ids.begin(), s.ids.end() - static_cast<std::ptrdiff_t>(max_len));
    s.is_target.assign(s.ids.size(), 0);
  }
  return out;
}

}  // namespace mm
