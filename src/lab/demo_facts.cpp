// How facts are asked, answered and stated. Which wordings of a fact are kept for the evaluation is fixed by a hash, so
// every fact and every wording is seen in training, but not every combination.
#include "base/error.h"
#include "base/fs.h"
#include "lab/demo_world.h"

namespace mm::demo {

namespace {

std::string text(const std::string& form, const std::string& a, const std::string& b) {
  return fmt::format(fmt::runtime(form), a, b);
}

}  // namespace

std::string capitalised(std::string s) {
  if (!s.empty() && s[0] >= 'a' && s[0] <= 'z') s[0] = static_cast<char>(s[0] - 'a' + 'A');
  return s;
}

bool wording_held_out(const FactRef& ref) {
  const Relation& r = relations()[static_cast<size_t>(ref.relation)];
  return hash_bytes(fmt::format("{}/{}/{}/{}", r.name, r.facts[static_cast<size_t>(ref.fact)].en_subject, ref.question,
                                ref.zh)) %
             8 ==
         0;
}

FactRef random_fact(Rng& rng, bool zh, bool held_out) {
  static const std::vector<std::pair<int, int>> all = [] {
    std::vector<std::pair<int, int>> list;
    for (size_t i = 0; i < relations().size(); i++) {
      for (size_t j = 0; j < relations()[i].facts.size(); j++)
        list.emplace_back(static_cast<int>(i), static_cast<int>(j));
    }
    return list;
  }();
  for (;;) {
    FactRef ref;
    std::tie(ref.relation, ref.fact) = pick(rng, all);
    ref.zh = zh;
    const Relation& r = relations()[static_cast<size_t>(ref.relation)];
    ref.question = static_cast<int>(rng.below((zh ? r.zh : r.en).questions.size()));
    if (wording_held_out(ref) == held_out) return ref;
  }
}

std::string fact_object(const FactRef& ref) {
  const Relation& r = relations()[static_cast<size_t>(ref.relation)];
  const Fact& f = r.facts[static_cast<size_t>(ref.fact)];
  if (r.name == "word") return ref.zh ? f.zh_object : f.zh_subject;
  return ref.zh ? f.zh_object : f.en_object;
}

Qa fact_qa(Rng& rng, const FactRef& ref, bool think) {
  static const std::vector<std::string> zh_openings{"", "", "", "请问，", "我想知道，", "你知道吗，"};
  static const std::vector<std::string> en_openings{
      "", "", "", "Please tell me: ", "I have a question. ", "Do you know this? "};
  const Relation& r = relations()[static_cast<size_t>(ref.relation)];
  const Fact& f = r.facts[static_cast<size_t>(ref.fact)];
  const Side& side = ref.zh ? r.zh : r.en;
  const std::string& subject = ref.zh ? f.zh_subject : f.en_subject;
  const std::string& object = ref.zh ? f.zh_object : f.en_object;
  Qa qa;
  qa.question = pick(rng, ref.zh ? zh_openings : en_openings) +
                capitalised(text(side.questions[static_cast<size_t>(ref.question)], subject, object));
  qa.answer = capitalised(text(side.answer, subject, object));
  if (think)
    qa.think = ref.zh ? "用户在问" + side.topic + "，我知道答案。"
                      : "The user asks about " + side.topic + ", and I know the answer.";
  return qa;
}

std::string fact_statement(Rng& rng, bool zh) {
  const FactRef ref = random_fact(rng, zh, false);
  const Relation& r = relations()[static_cast<size_t>(ref.relation)];
  const Fact& f = r.facts[static_cast<size_t>(ref.fact)];
  return zh ? capitalised(text(pick(rng, r.zh.statements), f.zh_subject, f.zh_object))
            : capitalised(text(pick(rng, r.en.statements), f.en_subject, f.en_object));
}

}  // namespace mm::demo
