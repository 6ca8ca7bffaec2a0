// What the demo's world holds: facts, small talk and sums, as question, thought and answer. Internal to lab/demo_*.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/rng.h"

namespace mm::demo {

struct Qa {
  std::string question, think, answer;  // think is "" for an answer without thinking
};

template <class T>
const T& pick(Rng& rng, const std::vector<T>& list) {
  return list[rng.below(list.size())];
}
inline bool chance(Rng& rng, double p) { return rng.uniform() < static_cast<float>(p); }
std::string capitalised(std::string text);  // first ASCII letter in upper case

// --- facts (demo_facts.cpp) ---

struct Side {  // one language of a relation; {0} is the subject, {1} the object
  std::vector<std::string> questions, statements;
  std::string answer, topic;  // topic completes "The user asks about ..."
};
struct Fact {
  std::string zh_subject, zh_object, en_subject, en_object;
};
struct Relation {
  std::string name;
  Side zh, en;
  std::vector<Fact> facts;
};
const std::vector<Relation>& relations();  // demo_fact_tables.cpp

struct FactRef {
  int relation = 0, fact = 0, question = 0;
  bool zh = false;
};
// A wording of one fact that only the validation set and the evaluation use (one in eight).
bool wording_held_out(const FactRef& ref);
FactRef random_fact(Rng& rng, bool zh, bool held_out);
Qa fact_qa(Rng& rng, const FactRef& ref, bool think);
std::string fact_object(const FactRef& ref);
std::string fact_statement(Rng& rng, bool zh);

// --- identity and small talk (demo_talk.cpp) ---

Qa identity_qa(Rng& rng, bool zh);
Qa talk_qa(Rng& rng, bool zh);
std::string system_prompt(Rng& rng, bool zh);

// --- numbers (demo_math.cpp) ---

// Tells pairs of two-digit numbers that must not meet in a question.
using PairFilter = std::function<bool(int, int)>;  // true: held out

std::pair<int, int> random_pair(Rng& rng, const PairFilter& held_out);  // both in 10..99, not held out
std::string addition_question(Rng& rng, bool zh, int a, int b);
std::string addition_answer(bool zh, int a, int b);
// a + b - c, with a c that keeps the answer at or above zero and is held out with neither a nor b.
Qa two_step_qa(Rng& rng, bool zh, int a, int b, const PairFilter& held_out, bool think);
Qa subtraction_qa(Rng& rng, bool zh, const PairFilter& held_out);
Qa number_qa(Rng& rng, bool zh, const PairFilter& held_out);  // counting, comparing, tables, copying

struct ToolUse {
  std::string question, expression, answer;
  int64_t result = 0;
};
ToolUse calculator_use(Rng& rng, bool zh);

}  // namespace mm::demo
