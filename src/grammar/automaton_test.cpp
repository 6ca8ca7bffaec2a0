// Tokens: a mask bit is set exactly where accept() succeeds, and accept() follows bytes, however a text is cut.
#include "grammar/automaton.h"

#include <chrono>
#include <thread>

#include "grammar/grammar_test_util.h"

namespace mm {

namespace {

std::vector<GrammarPtr> sample_grammars() {
  return {
      Grammar::json_object(),
      Grammar::regex("(?:[a-c]{2,5}|\\d+(?:\\.\\d+)?)(?:, ?.{1,3})*"),
      Grammar::regex("[\\u4e00-\\u9fff]{1,8}|\"[^\"]*\""),
      schema_of(
          R"({"type":"array","minItems":1,"items":{"type":"string","minLength":70,"maxLength":100},"maxItems":3})"),
      Grammar::regex("(?:a{3,20}[0-3]?){2,40}x|(?:[ab0-3]{7}){9,11}"),
      Grammar::regex("[\\w\\s\\W]{2,40}"),
      schema_of(
          R"({"type":"object","properties":{"name":{"type":"string","maxLength":12},"age":{"type":"integer","minimum":0,
                "maximum":150},"tags":{"type":"array","items":{"enum":["a","ab","abc"]}}},"required":["name"]})"),
      Grammar::sequence({Grammar::literal("<tool_call>\n"),
                         Grammar::alternatives({schema_of(R"({"type":"object","properties":{"x":{"type":"number"}}})"),
                                                schema_of(R"({"type":"array","items":{"type":"string"}})")}),
                         Grammar::literal("\n</tool_call>")}),
  };
}

// Random tokens of one to five bytes of what JSON is made of, some of them halves of characters, some twice.
TokenTable random_table(Rng& rng) {
  static const std::string bytes = "{}[]\",: abcx0123.\\unltresf-\xE4\xB8\xAD\xF0\x9F\x98\x80";
  std::vector<std::string> tokens{"", ""};
  for (const char c : bytes) tokens.emplace_back(1, c);
  while (tokens.size() < 600) {
    std::string token;
    for (uint64_t n = 1 + rng.below(5); n > 0; n--) token += bytes[rng.below(bytes.size())];
    tokens.push_back(rng.below(40) == 0 ? "" : rng.below(20) == 0 ? tokens[rng.below(tokens.size())] : token);
  }
  return TokenTable(std::move(tokens));
}

// At places along a random text, all tokens: the mask, accept() of the token, and its bytes one by one.
void expect_masks_are_accepts(const GrammarPtr& grammar, const TokenTable& table, Rng& rng, int steps) {
  static const TokenTable by_byte = byte_table();
  GrammarState state(grammar, table), bytes(grammar, by_byte);
  for (int step = 0; step < steps; step++) {
    const auto bits = mask_of(state, table);
    std::vector<int32_t> allowed;
    for (int32_t id = 0; id < table.size(); id++) {
      if (id == kStop) {
        ASSERT_EQ(bit(bits, id), state.complete());
        continue;
      }
      GrammarState by_token = state, one_by_one = bytes;
      const bool accepted = by_token.accept(id);
      ASSERT_EQ(bit(bits, id), accepted) << table.bytes(id);
      ASSERT_EQ(accepted, !table.bytes(id).empty() && feed(one_by_one, table.bytes(id))) << table.bytes(id);
      if (!accepted) continue;
      allowed.push_back(id);
      ASSERT_EQ(by_token.complete(), one_by_one.complete());
    }
    for (int64_t id = table.size(); id < static_cast<int64_t>(bits.size()) * 32; id++)
      ASSERT_FALSE(bit(bits, static_cast<int32_t>(id)));
    ASSERT_EQ(state.finished(), state.complete() && allowed.empty());
    if (allowed.empty()) return;
    const int32_t id = allowed[rng.below(allowed.size())];
    ASSERT_TRUE(state.accept(id));
    ASSERT_TRUE(feed(bytes, table.bytes(id)));
  }
}

double microseconds(auto&& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

TEST(GrammarState, MasksAreAcceptsInRandomVocabularies) {
  Rng rng{21, 0};
  for (int round = 0; round < 6; round++) {
    const TokenTable table = random_table(rng);
    for (const auto& grammar : sample_grammars()) expect_masks_are_accepts(grammar, table, rng, 40);
  }
}

TEST(GrammarState, MasksAreAcceptsInTheRealVocabulary) {
  const auto tokens = minimind_tokens();
  MM_REQUIRE_TOKENIZER(tokens);
  ASSERT_EQ(tokens.size(), 6400u);
  const TokenTable table(tokens);
  Rng rng{22, 0};
  for (const auto& grammar : sample_grammars()) expect_masks_are_accepts(grammar, table, rng, 40);
}

// However a text is cut into tokens: the same answers and the same masks.
TEST(GrammarState, TheCutsDoNotMatter) {
  const std::string text = R"({"name":"中é😀","age": 42,"tags":["ab","abc"]})";
  const auto grammar = sample_grammars()[6];
  Rng rng{23, 0};
  std::vector<std::string> pieces{""};
  for (size_t from = 0; from < text.size(); from++)
    for (size_t n = 1; n <= 6 && from + n <= text.size(); n++) pieces.push_back(text.substr(from, n));
  const TokenTable table(pieces);
  std::map<size_t, std::vector<uint32_t>> seen;  // masks by position
  for (int round = 0; round < 200; round++) {
    GrammarState state(grammar, table);
    for (size_t at = 0; at < text.size();) {
      const auto bits = mask_of(state, table);
      ASSERT_EQ(seen.try_emplace(at, bits).first->second, bits) << at;
      int32_t id = 0;
      while (id == 0 || text.compare(at, pieces[static_cast<size_t>(id)].size(), pieces[static_cast<size_t>(id)]) != 0)
        id = static_cast<int32_t>(rng.below(pieces.size()));
      ASSERT_TRUE(bit(bits, id));
      ASSERT_TRUE(state.accept(id));
      at += pieces[static_cast<size_t>(id)].size();
    }
    ASSERT_TRUE(state.finished());
  }
  EXPECT_EQ(seen.size(), text.size());
}

TEST(GrammarState, StopIdsExactlyWhereComplete) {
  const TokenTable table({"", "", "a", "b", "ab"});
  GrammarState state(Grammar::regex("ab?"), table);
  const auto mask = [&](std::vector<int32_t> stops) {
    uint32_t bits = ~0u;
    state.mask({&bits, 1}, stops);
    return bits;
  };
  EXPECT_EQ(mask({0, 1}), 0b10100u);
  EXPECT_EQ(mask({0, 2}), 0b10000u);  // a stop id that is a word too: not before the end
  EXPECT_FALSE(state.accept(3));
  EXPECT_FALSE(state.accept(0));
  EXPECT_FALSE(state.accept(-1));
  EXPECT_FALSE(state.accept(5));
  EXPECT_FALSE(state.complete());
  EXPECT_TRUE(state.accept(2));
  EXPECT_TRUE(state.complete());
  EXPECT_FALSE(state.finished());
  EXPECT_EQ(mask({0, 1}), 0b01011u);
  EXPECT_EQ(mask({}), 0b01000u);
  EXPECT_EQ(mask({0, 99, -5}), 0b01001u);
  EXPECT_TRUE(state.accept(3));
  EXPECT_TRUE(state.finished());
  EXPECT_EQ(mask({1}), 0b00010u);
  EXPECT_FALSE(state.accept(2));
}

TEST(GrammarState, DeadEndOfTheVocabularyIsAnEmptyMask) {
  const TokenTable table({"", "a", "c"});
  GrammarState state(Grammar::regex("ab"), table);
  EXPECT_TRUE(state.accept(1));
  EXPECT_EQ(mask_of(state, table)[0], 0u);
  EXPECT_FALSE(state.complete());
  GrammarState nothing(Grammar::literal(""), TokenTable(std::vector<std::string>{}));
  nothing.mask({}, {});
  EXPECT_TRUE(nothing.finished());
}

TEST(GrammarState, CopiesGoTheirOwnWay) {
  const TokenTable table = byte_table();
  GrammarState state(Grammar::regex("ab|cd"), table), other = state;
  EXPECT_TRUE(feed(state, "a"));
  EXPECT_TRUE(feed(other, "c"));
  EXPECT_FALSE(feed(other, "b"));
  GrammarState moved = std::move(other);
  EXPECT_TRUE(feed(moved, "d"));
  other = state;
  state = moved;
  EXPECT_TRUE(state.finished());
  EXPECT_FALSE(other.complete());
  EXPECT_TRUE(feed(other, "b"));
  EXPECT_TRUE(other.finished());
}

// More is learned than one automaton keeps: places are carried over to the next, also while other texts use the old
// one.
TEST(GrammarState, FullAutomataAreReplaced) {
  constexpr int n = 60'000;
  const TokenTable table = byte_table();
  const auto grammar = Grammar::json_schema({{"type", "string"}, {"minLength", n}, {"maxLength", n + 1}});
  GrammarState state(grammar, table);
  ASSERT_TRUE(feed(state, "\""));
  GrammarState left_behind = state;
  for (int i = 0; i < n; i++) {
    const auto bits = mask_of(state, table);
    ASSERT_TRUE(bit(bits, 1 + 'x')) << i;
    ASSERT_FALSE(bit(bits, 1 + '"')) << i;
    ASSERT_TRUE(feed(state, "x"));
  }
  EXPECT_TRUE(bit(mask_of(state, table), 1 + '"'));
  ASSERT_TRUE(feed(state, "y"));
  EXPECT_FALSE(feed(state, "z"));
  EXPECT_TRUE(feed(state, "\""));
  EXPECT_TRUE(state.finished());
  EXPECT_TRUE(feed(left_behind, "ab"));
  EXPECT_FALSE(feed(left_behind, "\""));
}

TEST(Automaton, FillsUpAndIsAdopted) {
  constexpr int n = 200'000;
  grammar::GraphBuilder b("test");
  const grammar::NodeId a = b.byte('a'), z = b.byte('z');
  const grammar::Graph graph = b.finish(b.seq({b.alt({b.repeat(a, n, n), b.repeat(a, n + 1, n + 1)}), z}));
  const TokenTable table = byte_table();
  auto automaton = std::make_unique<grammar::Automaton>(graph, table);
  auto state = automaton->start();
  std::vector<uint32_t> bits(9);
  int replaced = 0;
  for (int i = 0; i < n; i++) {
    automaton->mask(state, bits);
    state = automaton->step(state, "a");
    ASSERT_NE(state, grammar::Automaton::kDead) << i;
    if (!automaton->full()) continue;
    auto next = std::make_unique<grammar::Automaton>(graph, table);
    state = next->adopt(*automaton, state);
    automaton = std::move(next);
    replaced++;
  }
  EXPECT_GE(replaced, 1);
  EXPECT_NE(automaton->step(state, "z"), grammar::Automaton::kDead);
  EXPECT_NE(automaton->step(state, "az"), grammar::Automaton::kDead);
  EXPECT_EQ(automaton->step(state, "aaz"), grammar::Automaton::kDead);
}

TEST(GrammarState, NestingIsBoundedAndNeverStuck) {
  const TokenTable table = byte_table();
  GrammarState state(Grammar::json_object(), table);
  ASSERT_TRUE(feed(state, "{\"a\":"));
  int depth = 1;
  while (depth < 200 && feed(state, "[")) depth++;
  EXPECT_EQ(depth, grammar::kMaxLevels);
  EXPECT_FALSE(feed(state, "{"));
  EXPECT_TRUE(feed(state, fmt::format("1{}}}", std::string(static_cast<size_t>(depth - 1), ']'))));
  EXPECT_TRUE(state.finished());
  // Every value needs three more levels: the last that may be begun is the one that still fits.
  GrammarState deep(schema_of(R"({"type":"array","maxItems":2,"items":{"anyOf":[{"$ref":"#"},{"const":[[[1]]]}]}})"),
                    table);
  depth = 0;
  while (depth < 200 && feed(deep, "[")) depth++;
  EXPECT_EQ(depth, grammar::kMaxLevels);
  EXPECT_FALSE(mask_of(deep, table) == std::vector<uint32_t>(mask_of(deep, table).size(), 0));
}

TEST(GrammarState, OneGrammarInManyThreads) {
  Rng seed{24, 0};
  const TokenTable table = random_table(seed);
  const auto grammar = Grammar::json_object();
  std::vector<std::string> alone(8), together(8);
  const auto draw = [&](size_t i) {
    Rng rng{25, i};
    return random_text(grammar, table, rng, 150);
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < together.size(); i++) threads.emplace_back([&, i] { together[i] = draw(i); });
  for (auto& thread : threads) thread.join();
  for (size_t i = 0; i < alone.size(); i++) alone[i] = draw(i);
  EXPECT_EQ(alone, together);
}

TEST(Grammar, Composition) {
  const auto digit = Grammar::regex("[0-9]");
  const auto both = Grammar::sequence(
      {Grammar::literal("<"), Grammar::alternatives({digit, Grammar::literal("none")}), Grammar::literal(">")});
  EXPECT_TRUE(matches(both, "<7>"));
  EXPECT_TRUE(matches(both, "<none>"));
  EXPECT_FALSE(matches(both, "<>"));
  EXPECT_FALSE(matches(both, "<7"));
  EXPECT_TRUE(matches(Grammar::sequence({}), ""));
  EXPECT_TRUE(matches(Grammar::sequence({both, both}), "<1><none>"));
  EXPECT_NE(error_of([] { Grammar::alternatives({}); }), "");
  EXPECT_TRUE(matches(Grammar::json_schema(nullptr), "{\"a\":[1]}"));
  EXPECT_FALSE(matches(Grammar::json_schema(nullptr), "[1]"));
}

// Printed, and asserted with room for a disturbed machine and for sanitizers.
TEST(GrammarState, MasksAreCheap) {
  const auto tokens = minimind_tokens();
  MM_REQUIRE_TOKENIZER(tokens);
  const TokenTable table(tokens);
  std::vector<uint32_t> bits(200);
  const int32_t stop = 0;
  for (const auto& grammar : sample_grammars()) {
    std::vector<double> first, again, accepts;
    Rng rng{26, 0};
    GrammarState state(grammar, table);
    for (int step = 0; step < 100; step++) {
      first.push_back(microseconds([&] { state.mask(bits, {&stop, 1}); }));
      again.push_back(microseconds([&] { state.mask(bits, {&stop, 1}); }));
      std::vector<int32_t> allowed;
      for (int32_t id = 1; id < table.size(); id++)
        if (bit(bits, id)) allowed.push_back(id);
      if (allowed.empty()) break;
      const int32_t id = allowed[rng.below(allowed.size())];
      accepts.push_back(microseconds([&] { state.accept(id); }));
    }
    for (auto* times : {&first, &again, &accepts}) std::sort(times->begin(), times->end());
    std::printf("  %zu places: mask first %.1f us (worst %.1f), again %.2f us, accept %.2f us\n", first.size(),
                first[first.size() / 2], first.back(), again[again.size() / 2], accepts[accepts.size() / 2]);
    EXPECT_LT(first[first.size() * 3 / 4], 5'000);  // not the worst: other programs take the processor now and then
    EXPECT_LT(again[again.size() / 2], 20);
  }
}

}  // namespace mm
