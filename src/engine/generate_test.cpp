#include "engine/generate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "engine/test_model.h"
#include "text/bpe_trainer.h"

namespace mm {

static std::unique_ptr<Model> lively_model(int64_t vocab, uint64_t seed) {
  return lively_model(small_config(vocab), seed);
}

static Tokenizer small_tokenizer() {
  BpeTrainer trainer({.vocab_size = 300});
  trainer.feed({"the sea is wide and the sky is high", "你好，世界。你好，海洋。", "one two three four"});
  return trainer.train();
}

static GenerateRequest greedy(std::vector<int32_t> prompt, int64_t n) {
  GenerateRequest r;
  r.prompt = std::move(prompt);
  r.sampling.greedy = true;
  r.max_new_tokens = n;
  return r;
}

static GenerateResult run_one(Generator& g, const GenerateRequest& r, const TokenSink& sink = nullptr) {
  return g.run({&r, 1}, sink)[0];
}

// The greedy tokens that PyTorch computed without a cache.
static void expect_greedy_of(const std::string& dir) {
  SCOPED_TRACE(dir);
  const auto model = Model::load(dir);
  const auto expected = load_json(dir + "/expected.json")["greedy"];
  const auto tokens = expected["tokens"].get<std::vector<int32_t>>();
  for (const int64_t chunk : {1, 4, 256}) {
    Generator g(*model, std::nullopt, {.context = 64, .prefill_chunk = chunk});
    const auto result = run_one(g, greedy(expected["prompt"], static_cast<int64_t>(tokens.size())));
    EXPECT_EQ(result.ids, tokens) << "prefill in chunks of " << chunk;
    EXPECT_EQ(result.finish, FinishReason::length);
  }
}

TEST(Generate, GoldenGreedyTokens) {
  for (const char* arch : {"qwen3", "llama", "moe_top1", "moe_top2", "yarn"}) {
    expect_greedy_of(std::string(MM_SOURCE_DIR "/tests/golden/") + arch);
  }
}

TEST(Generate, OracleGreedyTokens) {
  const std::string dir = MM_SOURCE_DIR "/../shared/oracle/";
  if (!dir_exists(dir)) GTEST_SKIP() << "NOT TESTED: the oracle data " << dir << " is missing";
  for (const char* arch : {"qwen3", "llama", "moe_top1", "moe_top2", "yarn"}) expect_greedy_of(dir + arch);
}

TEST(Generate, TrainedModelsGreedyTexts) {
  const std::string dir = MM_SOURCE_DIR "/../shared/models/qwen3-8m";
  if (!dir_exists(dir)) GTEST_SKIP() << "NOT TESTED: the trained model " << dir << " is missing";
  const auto model = Model::load(dir);
  const auto tokenizer = Tokenizer::load(dir);
  Generator g(*model, tokenizer, {.context = 512});
  const ordered_json file = load_json(dir + "/expected.json");
  const ordered_json& cases = file["greedy_fp32"];
  ASSERT_GT(cases.size(), 0u);
  for (const auto& c : cases) {
    const auto expected = c["greedy_ids"].get<std::vector<int32_t>>();
    const auto margins = c["margins"].get<std::vector<double>>();
    EXPECT_EQ(tokenizer.encode(c["prompt"].get<std::string>()), c["prompt_ids"].get<std::vector<int32_t>>());
    auto request = greedy(c["prompt_ids"], static_cast<int64_t>(expected.size()));
    request.stop_ids = {tokenizer.eos_id()};
    const auto result = run_one(g, request);
    size_t sure = 0;  // steps before the first that rounding may decide
    while (sure < margins.size() && margins[sure] >= 1e-3) sure++;
    ASSERT_GE(result.ids.size(), sure);
    for (size_t i = 0; i < sure; i++) EXPECT_EQ(result.ids[i], expected[i]) << c["prompt"] << " step " << i;
    if (sure == expected.size()) {
      EXPECT_EQ(result.text, tokenizer.decode(expected, /*skip_special=*/true));
    }
  }
}

TEST(Generate, ChunksOfThePromptChangeNothing) {
  const auto model = lively_model(97, 5);
  auto request = greedy(some_prompt(41, 97), 20);
  request.logprobs = 3;
  Generator whole(*model, std::nullopt, {.prefill_chunk = 64});
  const auto expected = run_one(whole, request);
  for (const int64_t chunk : {1, 2, 5, 40, 41}) {
    Generator g(*model, std::nullopt, {.prefill_chunk = chunk});
    const auto result = run_one(g, request);
    EXPECT_EQ(result.ids, expected.ids) << chunk;
    ASSERT_EQ(result.logprobs.size(), expected.logprobs.size());
    for (size_t i = 0; i < result.logprobs.size(); i++) {
      EXPECT_NEAR(result.logprobs[i], expected.logprobs[i], 1e-4f) << chunk << " step " << i;
      ASSERT_EQ(result.top[i].size(), 3u);
      EXPECT_EQ(result.top[i][0].id, result.ids[i]);  // greedy
      EXPECT_EQ(result.top[i][0].logprob, result.logprobs[i]);
    }
  }
}

TEST(Generate, ABatchIsItsSequences) {
  const auto model = lively_model(97, 6);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 11; i++) {
    GenerateRequest r;
    r.prompt = some_prompt(1 + 5 * (i % 4), 97, i);
    r.max_new_tokens = 3 + 4 * (i % 5);
    r.sampling = {
        .temperature = 1.2f, .top_k = i % 3 == 0 ? 0 : 20, .repetition_penalty = 1 + 0.1f * float(i % 2), .seed = 9};
    r.stream = static_cast<uint64_t>(i);
    requests.push_back(r);
  }
  std::vector<std::vector<int32_t>> alone;
  Generator one(*model, std::nullopt, {});
  for (const auto& r : requests) alone.push_back(run_one(one, r).ids);
  for (const int64_t places : {1, 3, 11}) {  // fewer places than requests: they wait
    Generator g(*model, std::nullopt, {.max_sequences = places, .prefill_chunk = 7});
    std::vector<std::vector<int32_t>> streamed(requests.size());
    const auto results = g.run(requests, [&](size_t i, int32_t id, std::string_view) {
      streamed[i].push_back(id);
      return true;
    });
    for (size_t i = 0; i < requests.size(); i++) {
      EXPECT_EQ(results[i].ids, alone[i]) << places << " places, request " << i;
      EXPECT_EQ(streamed[i], alone[i]);
      EXPECT_EQ(static_cast<int64_t>(alone[i].size()), requests[i].max_new_tokens);
    }
  }
  EXPECT_NE(alone[0], alone[4]);  // same shape, other prompt and stream
}

TEST(Generate, TheSameSeedGivesTheSameTextAndStreamsDiffer) {
  const auto model = lively_model(300, 7);
  Generator g(*model, small_tokenizer(), {.max_sequences = 4});
  GenerateRequest r;
  r.prompt = some_prompt(5, 300);
  r.sampling = {.temperature = 1.5f, .top_k = 0, .top_p = 1, .seed = 3};
  r.max_new_tokens = 30;
  std::vector<GenerateRequest> requests(4, r);
  for (size_t i = 0; i < 4; i++) requests[i].stream = i;
  const auto first = g.run(requests), second = g.run(requests);
  for (size_t i = 0; i < 4; i++) {
    EXPECT_EQ(first[i].ids, second[i].ids);
    EXPECT_EQ(first[i].text, second[i].text);
    if (i > 0) {
      EXPECT_NE(first[i].ids, first[0].ids);
    }
  }
}

TEST(Generate, StreamedTextIsTheTextAndIsUtf8) {
  const auto model = lively_model(300, 8);
  const auto tokenizer = small_tokenizer();
  Generator g(*model, tokenizer, {});
  for (uint64_t seed = 0; seed < 5; seed++) {
    GenerateRequest r;
    r.prompt = some_prompt(5, 300);
    r.sampling = {.temperature = 2, .top_k = 0, .top_p = 1, .seed = seed};
    r.max_new_tokens = 80;
    std::string streamed;
    const auto result = run_one(g, r, [&](size_t, int32_t, std::string_view text) {
      EXPECT_NO_THROW(ordered_json(std::string(text)).dump());  // throws on half a character
      streamed += text;
      return true;
    });
    EXPECT_EQ(streamed, result.text);
    EXPECT_EQ(result.text, tokenizer.decode(result.ids, /*skip_special=*/true));
  }
}

TEST(Generate, StopStringsAcrossTokensAndStopIds) {
  const auto model = lively_model(300, 9);
  const auto tokenizer = small_tokenizer();
  Generator g(*model, tokenizer, {});
  GenerateRequest r;
  r.prompt = some_prompt(5, 300);
  r.sampling = {.temperature = 2, .top_k = 0, .top_p = 1, .seed = 1};
  r.max_new_tokens = 60;
  const auto free_run = run_one(g, r);
  ASSERT_EQ(free_run.ids.size(), 60u);
  // Three bytes that end in token 20 and begin in an earlier one.
  std::string stop;
  const std::span<const int32_t> head(free_run.ids.data(), 21);
  const std::string text = tokenizer.decode(head, true, /*raw=*/true);
  for (size_t end = text.size(); end >= 3 && stop.empty(); end--) {
    const std::string three = text.substr(end - 3, 3);
    const bool ascii = std::all_of(three.begin(), three.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
    if (ascii) stop = three;
  }
  ASSERT_FALSE(stop.empty()) << "choose another seed";
  r.stop_strings = {"never said", stop};
  std::string streamed;
  const auto stopped = run_one(g, r, [&](size_t, int32_t, std::string_view t) {
    streamed += t;
    return true;
  });
  EXPECT_EQ(stopped.finish, FinishReason::stop);
  EXPECT_EQ(stopped.text, free_run.text.substr(0, free_run.text.find(stop)));
  EXPECT_EQ(streamed, stopped.text);
  EXPECT_LE(stopped.ids.size(), 21u);

  r.stop_strings.clear();
  r.stop_ids = {-5, free_run.ids[12]};
  const auto by_id = run_one(g, r);
  const auto at = std::find(free_run.ids.begin(), free_run.ids.end(), free_run.ids[12]) - free_run.ids.begin();
  EXPECT_EQ(by_id.finish, FinishReason::stop);
  ASSERT_EQ(by_id.ids.size(), static_cast<size_t>(at) + 1);  // the stop id included
  EXPECT_EQ(by_id.text, tokenizer.decode(std::span(free_run.ids).first(static_cast<size_t>(at)), true));
}

TEST(Generate, TheSinkCancelsOneSequence) {
  const auto model = lively_model(97, 10);
  Generator g(*model, std::nullopt, {.max_sequences = 2});
  const std::vector<GenerateRequest> requests{greedy(some_prompt(5, 97), 20), greedy(some_prompt(6, 97), 20)};
  int seen = 0;
  const auto results = g.run(requests, [&](size_t i, int32_t, std::string_view) { return i == 1 || ++seen < 4; });
  EXPECT_EQ(results[0].finish, FinishReason::cancelled);
  EXPECT_EQ(results[0].ids.size(), 4u);
  EXPECT_EQ(results[1].finish, FinishReason::length);
  EXPECT_EQ(results[1].ids.size(), 20u);
  EXPECT_EQ(run_one(g, requests[0]).ids.size(), 20u);  // usable as before
}

TEST(Generate, TheContextEndsASequence) {
  const auto model = lively_model(97, 11);
  Generator g(*model, std::nullopt, {.context = 30});
  const auto result = run_one(g, greedy(some_prompt(22, 97), 1000));
  EXPECT_EQ(result.ids.size(), 8u);
  EXPECT_EQ(result.finish, FinishReason::length);
  EXPECT_EQ(run_one(g, greedy(some_prompt(29, 97), 1000)).ids.size(), 1u);
  EXPECT_THROW(run_one(g, greedy(some_prompt(30, 97), 1)), Error);
  Generator model_limit(*model, std::nullopt, {});
  EXPECT_EQ(model_limit.context(), 96);
  EXPECT_EQ(run_one(model_limit, greedy(some_prompt(50, 97), 1000)).ids.size(), 46u);
}

TEST(Generate, AConversationReusesItsBeginning) {
  const auto model = lively_model(97, 12);
  Generator fresh(*model, std::nullopt, {}), reusing(*model, std::nullopt, {.reuse_prefix = true});
  auto prompt = some_prompt(9, 97);
  int64_t known = 0;  // in whole blocks of 16 tokens
  const auto blocks = [](size_t n) { return static_cast<int64_t>(n) / 16 * 16; };
  for (int turn = 0; turn < 4; turn++) {
    const auto expected = run_one(fresh, greedy(prompt, 7)), result = run_one(reusing, greedy(prompt, 7));
    EXPECT_EQ(result.ids, expected.ids) << turn;
    EXPECT_EQ(expected.cached_tokens, 0);
    EXPECT_EQ(result.cached_tokens, known);
    prompt.insert(prompt.end(), result.ids.begin(), result.ids.end());
    known = blocks(prompt.size() - 1);  // the last token was never fed
    const auto more = some_prompt(4, 97, turn);
    prompt.insert(prompt.end(), more.begin(), more.end());
  }
  // The same prompt again: its last token is fed all the same. Then one that shares
  // sixteen tokens and a few more.
  EXPECT_EQ(run_one(reusing, greedy(prompt, 7)).ids, run_one(fresh, greedy(prompt, 7)).ids);
  const auto again = run_one(reusing, greedy(prompt, 7));
  EXPECT_EQ(again.cached_tokens, blocks(prompt.size() - 1));
  auto other = prompt;
  other.resize(30);
  other[20]++;
  const auto branched = run_one(reusing, greedy(other, 7));
  EXPECT_EQ(branched.cached_tokens, 16);
  EXPECT_EQ(branched.ids, run_one(fresh, greedy(other, 7)).ids);
}

TEST(Generate, SpeculationByNgramsChangesNoToken) {
  const auto model = lively_model(97, 15);
  Generator plain(*model, std::nullopt, {.max_sequences = 3}),
      speculating(*model, std::nullopt, {.max_sequences = 3, .ngram_draft = 4});
  std::vector<GenerateRequest> requests;
  for (int64_t i = 0; i < 6; i++) {
    auto r = greedy(some_prompt(6, 5, i), 60);  // five tokens, so that beginnings come back
    r.sampling.greedy = i % 2 == 0;
    r.sampling.top_k = 4;
    r.sampling.seed = static_cast<uint64_t>(i);
    if (i == 4) r.sampling.repetition_penalty = 1.05f;
    requests.push_back(r);
  }
  const auto expected = plain.run(requests), result = speculating.run(requests);
  int64_t accepted = 0;
  for (size_t i = 0; i < requests.size(); i++) {
    EXPECT_EQ(result[i].ids, expected[i].ids) << i;
    accepted += result[i].accepted_tokens;
  }
  EXPECT_GT(accepted, 0);
}

TEST(Generate, BadRequestsAreErrorsBeforeAnythingRuns) {
  const auto model = lively_model(97, 13);
  Generator g(*model, std::nullopt, {});
  const auto good = greedy(some_prompt(5, 97), 3);
  const auto bad = [&](auto change) {
    auto r = good;
    change(r);
    int tokens = 0;
    const std::vector<GenerateRequest> requests{good, r};
    EXPECT_THROW(g.run(requests, [&](size_t, int32_t, std::string_view) { return ++tokens > 0; }), Error);
    EXPECT_EQ(tokens, 0);
  };
  bad([](auto& r) { r.prompt.clear(); });
  bad([](auto& r) { r.prompt[2] = 97; });
  bad([](auto& r) { r.prompt[2] = -1; });
  bad([](auto& r) { r.max_new_tokens = 0; });
  bad([](auto& r) { r.stop_strings = {"x"}; });  // no tokenizer
  bad([](auto& r) { r.sampling.top_p = 2; });
  EXPECT_THROW(Generator(*model, std::nullopt, {.context = 97}), Error);
  EXPECT_THROW(Generator(*model, std::nullopt, {.max_sequences = 0}), Error);
  EXPECT_THROW(Generator(*model, std::nullopt, {.prefill_chunk = 0}), Error);
  EXPECT_TRUE(g.run({}).empty());
}

TEST(Generate, BrokenWeightsAreAnErrorAndTheNextRunStartsAfresh) {
  const auto model = lively_model(97, 14);
  Generator g(*model, std::nullopt, {.reuse_prefix = true});
  const auto request = greedy(some_prompt(9, 97), 5);
  const auto expected = run_one(g, request).ids;
  float& weight = *model->weights.final_norm.f32();
  const float kept = std::exchange(weight, std::nanf(""));
  g.update_weights(*model);
  EXPECT_THROW(run_one(g, request), Error);
  weight = kept;
  g.update_weights(*model);
  EXPECT_EQ(run_one(g, request).ids, expected);
}

}  // namespace mm
