// What a data set file holds: counts, lengths, bad rows; and single rows for a look.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/sample_stream.h"
#include "data/samples.h"

namespace mm {

struct DataReport {
  std::string path;
  SampleKind kind = SampleKind::pretrain;
  BadRows rows;
  bool tokenized = false;           // the fields below are set
  int64_t tokens = 0, targets = 0;  // after rows are cut
  int64_t truncated = 0;            // sequences longer than max_len (a preference row has two sequences)
  int64_t without_targets = 0;      // sequences to learn from that hold nothing to learn (cut before the answer)
  std::vector<int32_t> lengths;     // of the sequences before cutting, ascending
  int64_t longest_line = 0;

  int64_t length_percentile(int percent) const;  // 0 where there are no sequences
  ordered_json to_json() const;
};

// Reads the whole file as training would (kind by its first row; options.kind is not used). Tokenizer may be null.
DataReport report_data(const std::string& path, const Tokenizer* tokenizer, SampleOptions options);

// Line `number` (from 1) of a data set file. Error if the file is shorter or the line blank.
std::string read_data_line(const std::string& path, int64_t number);

// Neighbouring tokens that together hold whole characters: for showing tokens as text.
struct TokenPiece {
  std::string text;        // valid UTF-8 unless the sequence itself ends inside a character
  bool is_target = false;  // of its last token
};
std::vector<TokenPiece> token_pieces(const Tokenizer& tokenizer, const TokenSequence& sequence);

}  // namespace mm
