#include "data/report.h"

#include <algorithm>

#include "base/error.h"
#include "data/jsonl.h"

namespace mm {

int64_t DataReport::length_percentile(int percent) const {
  if (lengths.empty()) return 0;
  return lengths[(lengths.size() - 1) * static_cast<size_t>(percent) / 100];
}

ordered_json DataReport::to_json() const {
  ordered_json bad = ordered_json::array();
  for (const BadRow& b : rows.first) bad.push_back({{"line", b.line}, {"reason", b.reason}});
  ordered_json j = {{"file", path}, {"kind", kind_name(kind)}, {"rows", rows.rows}, {"bad_rows", rows.bad}};
  if (tokenized) {
    j["tokens"] = tokens;
    j["targets"] = targets;
    j["truncated"] = truncated;
    j["without_targets"] = without_targets;
    ordered_json length;
    for (const int p : {50, 90, 95, 99}) length[fmt::format("p{}", p)] = length_percentile(p);
    length["max"] = length_percentile(100);
    length["max_line"] = longest_line;
    j["length"] = length;
  }
  j["first_bad_rows"] = bad;
  return j;
}

DataReport report_data(const std::string& path, const Tokenizer* tokenizer, SampleOptions options) {
  DataReport r;
  r.path = path;
  r.kind = options.kind = detect_kind(path);
  r.tokenized = tokenizer != nullptr;
  int64_t longest = 0;
  stream_samples({path}, tokenizer, options, "check " + path, [&](StreamedRow& row) {
    r.rows.add(row);
    for (const TokenSequence& s : row.sequences) {
      const int64_t n = static_cast<int64_t>(s.ids.size()),
                    targets = std::count(s.is_target.begin(), s.is_target.end(), 1);
      r.tokens += n;
      r.targets += targets;
      r.truncated += s.full_len > n;
      r.without_targets += r.kind != SampleKind::prompt && targets == 0;
      r.lengths.push_back(static_cast<int32_t>(std::min<int64_t>(s.full_len, INT32_MAX)));
      if (s.full_len > longest) {
        longest = s.full_len;
        r.longest_line = row.line;
      }
    }
  });
  std::sort(r.lengths.begin(), r.lengths.end());
  return r;
}

std::string read_data_line(const std::string& path, int64_t number) {
  JsonlReader reader(path);
  JsonlChunk chunk;
  std::string found;
  while (found.empty() && reader.next(chunk) && chunk.first_line <= number) {
    for_each_line(chunk, [&](int64_t n, std::string_view line) {
      if (n == number) found = line;
    });
  }
  if (found.empty()) throw Error(path, fmt::format("a row on line {}", number), "none");
  return found;
}

// Bytes of the character that begins with `lead`; 1 for bytes that begin none.
static size_t character_bytes(unsigned char lead) {
  return lead >= 0xf0 && lead < 0xf8 ? 4 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xc0 && lead < 0xe0 ? 2 : 1;
}

// Whether the text ends inside a character that more bytes could complete.
static bool ends_inside_character(std::string_view text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); back++) {
    const auto c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xc0) != 0x80) return character_bytes(c) > back;
  }
  return false;
}

std::vector<TokenPiece> token_pieces(const Tokenizer& tokenizer, const TokenSequence& sequence) {
  std::vector<TokenPiece> out;
  bool open = false;
  for (size_t t = 0; t < sequence.ids.size(); t++) {
    if (!open) out.emplace_back();
    out.back().text += tokenizer.token_bytes(sequence.ids[t]);
    out.back().is_target = sequence.is_target[t] != 0;
    open = ends_inside_character(out.back().text);
  }
  return out;
}

}  // namespace mm
