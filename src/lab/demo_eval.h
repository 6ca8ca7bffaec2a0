// Asks the demo's model: scores on unseen questions, and a sample conversation with a working calculator.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "engine/generate.h"
#include "lab/demo_corpus.h"

namespace mm {

struct DemoScore {
  int64_t right = 0, asked = 0;
  std::vector<std::pair<DemoQuestion, std::string>> wrong;  // the first few, with the reply
  double share() const { return asked > 0 ? static_cast<double>(right) / static_cast<double>(asked) : 0; }
};

enum class DemoMatch { last_number, contains };  // contains: letters of either case

// Greedy replies to all questions, each a conversation of its own. think: the reply begins inside <think>.
DemoScore score_demo(Generator& generator, const Tokenizer& tokenizer, const std::vector<DemoQuestion>& questions,
                     DemoMatch match, bool think);

// Greedy turns of one conversation. Calls of the calculator are carried out and their result is given back to the
// model, at most three times a turn.
class DemoConversation {
 public:
  DemoConversation(Generator& generator, Tokenizer tokenizer, bool with_calculator);
  // What the model wrote for this turn, in parts: {"think" | "call" | "result" | "answer", text}.
  std::vector<std::pair<std::string, std::string>> ask(const std::string& question, bool think);

 private:
  Generator& generator_;
  Tokenizer tokenizer_;
  ordered_json messages_ = ordered_json::array(), tools_;
};

}  // namespace mm
