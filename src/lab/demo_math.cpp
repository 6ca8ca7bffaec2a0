// Sums with their working written out. A model of a million weights does not learn to add by heart, but it does learn
// to copy digits and to know 200 one-digit sums, so every answer shows the columns from right to left, with the carry.
#include <array>
#include <string>

#include "base/error.h"
#include "lab/demo_world.h"

namespace mm::demo {

namespace {

std::string text(const std::string& form, const auto&... args) { return fmt::format(fmt::runtime(form), args...); }

// "个位7+8=15，写5进1；十位2+5+1=8" / "ones 7+8=15, write 5 carry 1; tens 2+5+1=8". a in 0..199, b in 0..99.
std::string addition_columns(bool zh, int a, int b) {
  const int ones = a % 10 + b % 10, carry = ones / 10, tens = a / 10 + b / 10 + carry;
  std::string s = text(zh ? "个位{}+{}={}" : "ones {}+{}={}", a % 10, b % 10, ones);
  if (carry) s += text(zh ? "，写{}进1" : ", write {} carry 1", ones % 10);
  s += text(zh ? "；十位{}+{}" : "; tens {}+{}", a / 10, b / 10);
  if (carry) s += "+1";
  return s + text("={}", tens);
}

// "个位13-8=5，借1；十位6-1=5，5-2=3" / "ones 13-8=5, borrow 1; tens 6-1=5, 5-2=3": one operation at a time. (Written
// as 6-1-2=3 a tenth to a quarter of the two-step sums went wrong here.)
std::string subtraction_columns(bool zh, int a, int b) {
  const int borrow = a % 10 < b % 10 ? 1 : 0, ones = a % 10 + 10 * borrow, tens = a / 10 - borrow;
  std::string s = text(zh ? "个位{}-{}={}" : "ones {}-{}={}", ones, b % 10, ones - b % 10);
  if (borrow) s += text(zh ? "，借1；十位{}-1={}，" : ", borrow 1; tens {}-1={}, ", a / 10, tens);
  else s += zh ? "；十位" : "; tens ";
  return s + text("{}-{}={}", tens, b / 10, tens - b / 10);
}

const std::vector<std::string> kZhNames{"小明", "小红", "小华", "小丽", "小刚", "爸爸", "妈妈", "老师", "爷爷", "小猫"};
const std::vector<std::string> kEnNames{"Tom", "Anna", "Ben", "Lucy", "Sam", "Mary", "Dad", "Mum", "Jack", "Kate"};
const std::vector<std::pair<std::string, std::string>> kZhThings{{"个", "苹果"}, {"本", "书"},   {"支", "铅笔"},
                                                                 {"颗", "糖"},   {"张", "邮票"}, {"朵", "花"},
                                                                 {"块", "石头"}, {"个", "球"}};
const std::vector<std::string> kEnThings{"apples", "books",   "pencils", "sweets",
                                         "stamps", "flowers", "stones",  "balls"};

const std::vector<std::string> kZhSums{"{}+{}等于多少？",    "{}加{}等于几？",     "{}+{}=？",        "计算{}+{}",
                                       "请问{}加{}是多少？", "{}和{}的和是多少？", "帮我算一下{}+{}", "算算{}加{}"};
const std::vector<std::string> kEnSums{"What is {}+{}?",
                                       "What is {} plus {}?",
                                       "{} + {} = ?",
                                       "Calculate {}+{}.",
                                       "Please add {} and {}.",
                                       "What is the sum of {} and {}?",
                                       "How much is {} plus {}?",
                                       "{}+{}"};
// Names, count word and thing are {2} {3} {4}.
const std::vector<std::string> kZhStories{
    "{2}有{0}{3}{4}，又买了{1}{3}，现在有多少{3}？", "{2}上午数了{0}{3}{4}，下午数了{1}{3}，一共数了多少{3}？",
    "左边有{0}{3}{4}，右边有{1}{3}，{2}一共看到多少{3}？", "{2}先拿了{0}{3}{4}，再拿了{1}{3}，一共拿了多少{3}？"};
const std::vector<std::string> kEnStories{"{2} has {0} {3} and buys {1} more. How many {3} now?",
                                          "{2} finds {0} {3} today and {1} tomorrow. How many in all?",
                                          "There are {0} {3} on the left and {1} on the right. How many does {2} see?",
                                          "{2} has {0} {3}. A friend gives {1} more. How many {3} is that?"};
const std::vector<std::string> kZhTakes{"{}-{}等于多少？", "{}减{}等于几？", "计算{}-{}", "{}减去{}是多少？"};
const std::vector<std::string> kEnTakes{"What is {}-{}?", "What is {} minus {}?", "Calculate {}-{}.",
                                        "Take {1} from {0}."};
const std::vector<std::string> kZhSteps{"{}+{}-{}等于多少？", "计算{}+{}-{}", "{}加{}再减{}是多少？",
                                        "先算{}+{}，再减{}，得多少？"};
const std::vector<std::string> kEnSteps{"What is {}+{}-{}?", "Calculate {}+{}-{}.", "What is {} plus {} minus {}?",
                                        "Add {} and {}, then take away {}."};
const std::vector<std::string> kZhStepStories{"{3}有{0}{4}{5}，又买了{1}{4}，送给别人{2}{4}，还剩多少{4}？",
                                              "车上有{0}人，上来{1}人，下去{2}人，{3}数一数还有多少人？"};
const std::vector<std::string> kEnStepStories{
    "{3} has {0} {4}, buys {1} more and gives away {2}. How many {4} are left?",
    "{0} people are on a bus, {1} get on and {2} get off. How many does {3} count?"};

}  // namespace

std::pair<int, int> random_pair(Rng& rng, const PairFilter& held_out) {
  for (;;) {
    const int a = 10 + static_cast<int>(rng.below(90)), b = 10 + static_cast<int>(rng.below(90));
    if (!held_out(a, b)) return {a, b};
  }
}

std::string addition_question(Rng& rng, bool zh, int a, int b) {
  if (chance(rng, 0.7)) return text(pick(rng, zh ? kZhSums : kEnSums), a, b);
  if (!zh) return text(pick(rng, kEnStories), a, b, pick(rng, kEnNames), pick(rng, kEnThings));
  const auto& [measure, thing] = pick(rng, kZhThings);
  return text(pick(rng, kZhStories), a, b, pick(rng, kZhNames), measure, thing);
}

std::string addition_answer(bool zh, int a, int b) {
  return text(zh ? "{}+{}：{}。答案是{}。" : "{}+{}: {}. The answer is {}.", a, b, addition_columns(zh, a, b), a + b);
}

Qa subtraction_qa(Rng& rng, bool zh, const PairFilter& held_out) {
  auto [a, b] = random_pair(rng, held_out);
  if (a < b) std::swap(a, b);
  return {
      text(pick(rng, zh ? kZhTakes : kEnTakes), a, b), "",
      text(zh ? "{}-{}：{}。答案是{}。" : "{}-{}: {}. The answer is {}.", a, b, subtraction_columns(zh, a, b), a - b)};
}

Qa two_step_qa(Rng& rng, bool zh, int a, int b, const PairFilter& held_out, bool think) {
  int c;
  do c = 10 + static_cast<int>(rng.below(90));
  while (c > a + b || held_out(a, c) || held_out(b, c));
  Qa qa;
  if (chance(rng, 0.7)) {
    qa.question = text(pick(rng, zh ? kZhSteps : kEnSteps), a, b, c);
  } else if (zh) {
    const auto& [measure, thing] = pick(rng, kZhThings);
    qa.question = text(pick(rng, kZhStepStories), a, b, c, pick(rng, kZhNames), measure, thing);
  } else {
    qa.question = text(pick(rng, kEnStepStories), a, b, c, pick(rng, kEnNames), pick(rng, kEnThings));
  }
  const int sum = a + b;
  const std::string working =
      zh ? text("先算{}+{}：{}，得{}。再算{}-{}：{}，得{}。", a, b, addition_columns(true, a, b), sum, sum, c,
                subtraction_columns(true, sum, c), sum - c)
         : text("First {}+{}: {}, so {}. Then {}-{}: {}, so {}.", a, b, addition_columns(false, a, b), sum, sum, c,
                subtraction_columns(false, sum, c), sum - c);
  const std::string result = text(zh ? "答案是{}。" : "The answer is {}.", sum - c);
  if (think) {
    qa.think = working;
    qa.answer = result;
  } else {
    qa.answer = working + (zh ? "" : " ") + result;
  }
  return qa;
}

Qa number_qa(Rng& rng, bool zh, const PairFilter& held_out) {
  switch (rng.below(6)) {
    case 0: {  // counting up or down within one row of ten
      const int first = static_cast<int>(rng.below(15)), n = 3 + static_cast<int>(rng.below(5));
      const bool down = chance(rng, 0.3);
      const int last = first + n, from = down ? last : first, to = down ? first : last;
      if (held_out(from, to)) return number_qa(rng, zh, held_out);
      std::string list;
      for (int i = from;; i += down ? -1 : 1) {
        list += (list.empty() ? "" : zh ? "、" : ", ") + std::to_string(i);
        if (i == to) break;
      }
      return {text(zh ? "从{}数到{}" : "Count from {} to {}.", from, to), "", list + (zh ? "。" : ".")};
    }
    case 1: {  // which is larger
      const auto [a, b] = random_pair(rng, held_out);
      if (a == b) return number_qa(rng, zh, held_out);
      const bool more = chance(rng, 0.5);
      const int answer = more ? std::max(a, b) : std::min(a, b);
      return {
          zh ? text("{}和{}哪个更{}？", a, b, more ? "大" : "小")
             : text("Which is {}, {} or {}?", more ? "larger" : "smaller", a, b),
          "",
          zh ? text("{}更{}。", answer, more ? "大" : "小") : text("{} is {}.", answer, more ? "larger" : "smaller")};
    }
    case 2: {  // one-digit products
      const int a = 1 + static_cast<int>(rng.below(9)), b = 1 + static_cast<int>(rng.below(9));
      return {zh ? text("{}乘{}等于几？", a, b) : text("What is {} times {}?", a, b), "",
              zh ? text("{}乘{}等于{}。", a, b, a * b) : text("{} times {} is {}.", a, b, a * b)};
    }
    case 3: {  // one-digit sums
      const int a = static_cast<int>(rng.below(10)), b = static_cast<int>(rng.below(10));
      return {zh ? text("{}+{}等于几？", a, b) : text("What is {}+{}?", a, b), "",
              zh ? text("{}+{}={}。答案是{}。", a, b, a + b, a + b)
                 : text("{}+{}={}. The answer is {}.", a, b, a + b, a + b)};
    }
    case 4: {  // the digits of a number
      const int a = 10 + static_cast<int>(rng.below(90));
      return {zh ? text("{}的十位和个位是几？", a) : text("What are the digits of {}?", a), "",
              zh ? text("{}的十位是{}，个位是{}。", a, a / 10, a % 10)
                 : text("{} has tens {} and ones {}.", a, a / 10, a % 10)};
    }
    default: {  // odd or even
      const int a = static_cast<int>(rng.below(100));
      return {zh ? text("{}是单数还是双数？", a) : text("Is {} odd or even?", a), "",
              zh ? text("{}是{}数。", a, a % 2 ? "单" : "双") : text("{} is {}.", a, a % 2 ? "odd" : "even")};
    }
  }
}

ToolUse calculator_use(Rng& rng, bool zh) {
  const auto number = [&](int lowest, int highest) {
    return lowest + static_cast<int64_t>(rng.below(static_cast<uint64_t>(highest - lowest)));
  };
  int64_t a, b, result;
  char op;
  switch (rng.below(3)) {
    case 0: a = number(100, 10000), b = number(100, 10000), op = '+', result = a + b; break;
    case 1: a = number(1000, 10000), b = number(100, 1000), op = '-', result = a - b; break;
    default: a = number(12, 1000), b = number(12, 1000), op = '*', result = a * b;
  }
  static const std::vector<std::string> zh_forms{"{}{}{}等于多少？", "请用计算器算{}{}{}", "帮我计算{}{}{}",
                                                 "{}{}{}=？"};
  static const std::vector<std::string> en_forms{"What is {}{}{}?", "Use the calculator for {}{}{}.",
                                                 "Please compute {}{}{}.", "{}{}{} = ?"};
  ToolUse use;
  use.question = text(pick(rng, zh ? zh_forms : en_forms), a, op, b);
  use.expression = text("{}{}{}", a, op, b);
  use.result = result;
  use.answer = text(zh ? "计算结果是{}。" : "The result is {}.", result);
  return use;
}

}  // namespace mm::demo
