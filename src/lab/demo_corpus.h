// The corpus that `minimind demo` trains on: a small bilingual (Chinese, English) world made from tables and templates,
// so that nothing has to be downloaded and the answers to unseen questions can be checked.
//
// Everything is a pure function of DemoCorpusOptions: the same options give the same bytes on every machine.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

struct DemoCorpusOptions {
  uint64_t seed = 42;
  int64_t pretrain_rows = 50000;  // rows of pretrain.jsonl, about 40 tokens each
  int64_t sft_rows = 28000;       // rows of sft.jsonl, about 70 tokens each
  int64_t valid_rows = 400;       // rows of sft_valid.jsonl: held-out sums and wordings
};

// Files in MiniMind's jsonl formats: pretrain {"text"}, sft and valid {"conversations": [...]}.
struct DemoCorpusFiles {
  std::string pretrain, sft, sft_valid;
};

// One question with the answer that the world gives. `expected` is what must appear: for sums the last number of the
// reply, for facts the object of the sentence.
struct DemoQuestion {
  std::string text, expected;
  bool zh = false;
};

// Writes the three files into `dir` (made if absent; each file complete or absent).
DemoCorpusFiles write_demo_corpus(const std::string& dir, const DemoCorpusOptions& options);

// True for the tenth of all pairs {a, b} of two-digit numbers that no training row adds up: no user message and no
// first line of a pretraining text holds both numbers, and no row holds a, b and a + b together, in whatever wording.
// Symmetric in a and b.
bool demo_pair_held_out(uint64_t seed, int a, int b);

// `count` additions of held-out pairs in the wordings of the training set, half Chinese, half English.
std::vector<DemoQuestion> demo_addition_questions(const DemoCorpusOptions& options, int64_t count);
// `count` problems a + b - c whose first step is such an addition.
std::vector<DemoQuestion> demo_two_step_questions(const DemoCorpusOptions& options, int64_t count);
// `count` facts, each asked in a wording that the training set never uses for that fact.
std::vector<DemoQuestion> demo_fact_questions(const DemoCorpusOptions& options, int64_t count);

// The last whole number in `reply`; none if it holds no digit.
std::optional<int64_t> demo_last_number(std::string_view reply);

// The calculator that the tool samples describe (a JSON string, as MiniMind's data has it).
const std::string& demo_calculator_tools();

}  // namespace mm
