#include "lab/load_plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "data/jsonl.h"

namespace mm {

namespace {

// Streams of random numbers, one a purpose.
enum : uint64_t { kPromptLength = 1, kOutputLength, kWords, kArrivals, kOrder };

constexpr std::array<const char*, 92> kWordList{
    "the",   "of",    "and",   "to",     "in",    "is",    "that",  "it",    "for",  "was",  "on",    "are",
    "as",    "with",  "they",  "at",     "be",    "this",  "from",  "have",  "or",   "by",   "one",   "had",
    "not",   "but",   "what",  "all",    "were",  "when",  "we",    "there", "can",  "an",   "your",  "which",
    "their", "if",    "do",    "will",   "each",  "about", "how",   "up",    "out",  "them", "then",  "she",
    "many",  "some",  "so",    "these",  "would", "other", "into",  "has",   "more", "her",  "two",   "like",
    "see",   "time",  "could", "no",     "make",  "than",  "first", "been",  "its",  "who",  "now",   "people",
    "my",    "made",  "over",  "did",    "down",  "only",  "way",   "find",  "use",  "may",  "water", "long",
    "very",  "after", "words", "called", "just",  "where", "most",  "know"};

double uniform(uint64_t seed, uint64_t stream, uint64_t i) {
  const auto r = philox4x32(seed, stream, i);
  return static_cast<double>((uint64_t{r[0]} << 32 | r[1]) >> 11) * 0x1p-53;
}

std::string content_of(const ordered_json& message) {
  const auto it = message.find("content");
  return it != message.end() && it->is_string() ? it->get<std::string>() : "";
}

}  // namespace

int64_t LengthDistribution::draw(uint64_t seed, uint64_t stream, uint64_t i, int64_t max) const {
  double x = a;
  if (kind == Kind::uniform) x = std::floor(a + uniform(seed, stream, i) * (b - a + 1));
  if (kind == Kind::normal) x = std::round(a + b * philox_normal(seed, stream, i));
  if (kind == Kind::lognormal) x = std::round(a * std::exp(b * philox_normal(seed, stream, i)));
  return static_cast<int64_t>(std::clamp(x, 1.0, static_cast<double>(max)));
}

LengthDistribution length_distribution_from_text(const std::string& text, const std::string& flag) {
  std::vector<std::string> parts{""};
  for (const char c : text) {
    if (c == ':') parts.emplace_back();
    else parts.back() += c;
  }
  const auto number = [&](size_t i) {
    size_t used = 0;
    double v = NAN;
    try {
      if (i < parts.size()) v = std::stod(parts[i], &used);
    } catch (const std::exception&) {
    }
    return i < parts.size() && used == parts[i].size() && std::isfinite(v) && v >= 0 ? v : NAN;
  };
  using Kind = LengthDistribution::Kind;
  if (parts[0] == "fixed") parts.erase(parts.begin());
  if (parts.size() == 1 && number(0) >= 1) return {Kind::fixed, number(0), 0};
  if (parts.size() == 3) {
    const double a = number(1), b = number(2);
    if (parts[0] == "uniform" && a >= 1 && b >= a) return {Kind::uniform, a, b};
    if (parts[0] == "normal" && a >= 1 && b >= 0) return {Kind::normal, a, b};
    if (parts[0] == "lognormal" && a >= 1 && b >= 0) return {Kind::lognormal, a, b};
  }
  throw Error(flag, "N, uniform:FIRST:LAST, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA, in tokens",
              fmt::format("\"{}\"", text));
}

std::vector<double> poisson_arrivals(double rate, int64_t n, uint64_t seed) {
  std::vector<double> at;
  double t = 0;
  for (int64_t i = 0; i < n; i++) {
    at.push_back(t);
    t -= std::log1p(-uniform(seed, kArrivals, static_cast<uint64_t>(i))) / rate;
  }
  return at;
}

std::string synthetic_prompt(uint64_t seed, uint64_t i, int64_t n, int64_t shared) {
  std::string s;
  for (int64_t k = 0; k < n; k++) {
    const uint64_t stream = kWords + 16 * (k < shared ? 0 : i + 1);
    const auto word = static_cast<size_t>(uniform(seed, stream, static_cast<uint64_t>(k)) * kWordList.size());
    if (k > 0) s += ' ';
    s += kWordList[word];
  }
  return s;
}

std::vector<ordered_json> load_prompts(const std::string& path) {
  JsonlReader reader(path);
  JsonlChunk chunk;
  std::vector<ordered_json> prompts;
  while (reader.next(chunk)) {
    for_each_line(chunk, [&](int64_t number, std::string_view line) {
      const std::string where = fmt::format("{}:{}", path, number);
      const ordered_json row = parse_json(line, where);
      ordered_json messages = ordered_json::array();
      for (const char* key : {"conversations", "messages"}) {
        if (row.is_object() && row.contains(key) && row[key].is_array()) messages = row[key];
      }
      if (row.is_object() && row.contains("prompt") && row["prompt"].is_string())
        messages = {{{"role", "user"}, {"content", row["prompt"]}}};
      if (!messages.empty() && messages.back().value("role", "") == "assistant") messages.erase(messages.size() - 1);
      if (messages.empty())
        throw Error(where, "\"conversations\", \"messages\" or \"prompt\" with something to answer", "none");
      prompts.push_back(std::move(messages));
    });
  }
  if (prompts.empty()) throw Error(path, "rows of prompts", "none");
  return prompts;
}

ordered_json LoadPlan::request(uint64_t i) const {
  ordered_json messages;
  if (prompts.empty()) {
    const int64_t n = prompt_tokens.draw(seed, kPromptLength, i, max_tokens);
    messages = {{{"role", "user"}, {"content", synthetic_prompt(seed, i, n, shared_tokens)}}};
  } else {
    // A fixed multiplicative walk visits every row once before any comes again when its step and the count share no
    // factor; adding the round's offset keeps rounds apart.
    const uint64_t n = prompts.size();
    uint64_t step = static_cast<uint64_t>(uniform(seed, kOrder, 0) * static_cast<double>(n)) | 1;
    while (std::gcd(step, n) != 1) step += 2;
    messages = prompts[(i % n * step + seed % n) % n];
  }
  ordered_json body{{"model", model}};
  if (chat) {
    body["messages"] = std::move(messages);
  } else {
    body["prompt"] = content_of(messages.back());
  }
  body["max_tokens"] = output_tokens.draw(seed, kOutputLength, i, max_tokens);
  body["temperature"] = temperature;
  body["seed"] = (seed * 1000003 + i) % 2147483648u;
  body["stream"] = stream;
  if (stream) body["stream_options"] = {{"include_usage", true}};
  if (ignore_eos) body["ignore_eos"] = true;
  if (extra.is_object()) body.update(extra);
  return body;
}

}  // namespace mm
