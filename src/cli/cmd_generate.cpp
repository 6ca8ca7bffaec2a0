// `minimind generate`: one prompt in, text out.
#include <unistd.h>

#include <cstdio>

#include "base/error.h"
#include "base/fs.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "cli/sampling_flags.h"
#include "engine/chat_session.h"
#include "engine/generate.h"

namespace mm {

struct GenerateFlags {
  std::string model, prompt, chat, system;
  std::vector<int32_t> ids;
  bool think = false, no_empty_think = false, no_bos = false, ignore_eos = false;
  int64_t samples = 1, prefill_chunk = 256, ngram_draft = 0;
  std::string weights, regex, json_schema;
  GenerateRequest request;
  DeviceOptions device;
};

static std::vector<int32_t> prompt_ids(const GenerateFlags& f, const std::optional<Tokenizer>& tokenizer) {
  if (!f.ids.empty()) return f.ids;
  if (!tokenizer) throw Error(f.model, "tokenizer.json beside the model", "none", "give the prompt as --ids");
  if (!f.chat.empty()) {
    ordered_json messages = ordered_json::array();
    if (!f.system.empty()) messages.push_back({{"role", "system"}, {"content", f.system}});
    messages.push_back({{"role", "user"}, {"content", f.chat}});
    return tokenizer->encode(chat_prompt(messages, f.think, !f.no_empty_think));
  }
  std::vector<int32_t> ids = tokenizer->encode(f.prompt);
  // Pretraining rows begin with BOS; a prompt that is already templated does too.
  const int32_t bos = tokenizer->bos_id();
  if (!f.no_bos && bos >= 0 && (ids.empty() || ids[0] != bos)) ids.insert(ids.begin(), bos);
  return ids;
}

static ordered_json result_json(const GenerateRequest& request, const GenerateResult& result,
                                double tokens_per_second) {
  ordered_json j{{"ids", result.ids},
                 {"text", result.text},
                 {"finish_reason", finish_reason_name(result.finish)},
                 {"prompt_tokens", request.prompt.size()},
                 {"completion_tokens", result.ids.size()},
                 {"first_token_seconds", result.prefill_seconds},
                 {"tokens_per_second", tokens_per_second}};
  if (request.logprobs < 0) return j;
  ordered_json list = ordered_json::array();
  for (size_t i = 0; i < result.ids.size(); i++) {
    ordered_json top = ordered_json::array();
    for (const auto& t : result.top[i]) top.push_back({{"id", t.id}, {"logprob", t.logprob}});
    list.push_back({{"id", result.ids[i]}, {"logprob", result.logprobs[i]}, {"top", std::move(top)}});
  }
  j["logprobs"] = std::move(list);
  return j;
}

static void print_text(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw system_error("write failed", "standard output");
  }
}

static void generate(const GenerateFlags& f, const Globals& globals) {
  GenerateRequest request = f.request;
  check_sampling(request.sampling);
  if (!f.regex.empty()) request.grammar = Grammar::regex(f.regex, "--regex");
  if (!f.json_schema.empty()) request.grammar = Grammar::json_schema(load_json(f.json_schema), f.json_schema);
  std::optional<WeightFormat> weights;
  if (!f.weights.empty()) weights = weight_format_from_name(f.weights, "--weights");
  const OpenDevice open(f.device);
  const auto model = Model::load(f.model);
  std::optional<Tokenizer> tokenizer;
  if (file_exists(path_join(f.model, "tokenizer.json"))) tokenizer = Tokenizer::load(f.model);
  request.prompt = prompt_ids(f, tokenizer);
  if (!f.ignore_eos) {
    if (const auto eos = model->config.eos_token_id; eos >= 0) request.stop_ids.push_back(static_cast<int32_t>(eos));
    if (tokenizer && tokenizer->eos_id() >= 0) request.stop_ids.push_back(tokenizer->eos_id());
  }
  std::vector<GenerateRequest> requests(static_cast<size_t>(f.samples), request);
  for (size_t i = 0; i < requests.size(); i++) requests[i].stream = i;

  const int64_t limit = model->config.max_position_embeddings;
  const auto n_prompt = static_cast<int64_t>(request.prompt.size());
  if (n_prompt >= limit) {
    throw Error("prompt", fmt::format("fewer than {} tokens (the model's max_position_embeddings)", limit),
                fmt::format("{}", n_prompt), "shorten it");
  }
  const int64_t context = std::min(limit, std::max<int64_t>(n_prompt, 1) + std::min(limit, request.max_new_tokens));
  Generator generator(*model, tokenizer,
                      {.max_sequences = std::min<int64_t>(f.samples, 32),
                       .context = context,
                       .prefill_chunk = f.prefill_chunk,
                       .ngram_draft = f.ngram_draft,
                       .device = open.device,
                       .weights = weights});
  const bool stream = !globals.json && f.samples == 1;
  const double start = now_seconds();
  const auto results = generator.run(requests, [&](size_t, int32_t, std::string_view text) {
    if (stream) print_text(text);
    return true;
  });
  const double seconds = now_seconds() - start;
  int64_t tokens = 0;
  for (size_t i = 0; i < results.size(); i++) {
    const auto& r = results[i];
    const auto n = static_cast<int64_t>(r.ids.size());
    tokens += n;
    const double speed = r.decode_seconds > 0 ? static_cast<double>(n - 1) / r.decode_seconds : 0;
    if (globals.json)
      print_line(result_json(requests[i], r, speed).dump(-1, ' ', false, json::error_handler_t::replace));
    else if (!stream) print_line(r.text);
  }
  if (stream) print_text("\n");
  if (globals.quiet) return;
  if (results.size() == 1) {
    const auto& r = results[0];
    std::fprintf(stderr, "prompt %lld tokens, first token after %.1f ms, %lld tokens at %.1f tok/s (%s)\n",
                 static_cast<long long>(n_prompt), r.prefill_seconds * 1e3, static_cast<long long>(tokens),
                 r.decode_seconds > 0 ? static_cast<double>(tokens - 1) / r.decode_seconds : 0,
                 finish_reason_name(r.finish));
  } else {
    std::fprintf(stderr, "%zu samples, %lld tokens in %.2f s, %.1f tok/s\n", results.size(),
                 static_cast<long long>(tokens), seconds, static_cast<double>(tokens) / seconds);
  }
}

void add_generate_command(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<GenerateFlags>();
  GenerateRequest& request = flags->request;
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt or answer a message");
  command->add_option("--model", flags->model, "Model folder")->required();
  auto* input = command->add_option_group("input", "What to continue (one of these)");
  input->add_option("--prompt", flags->prompt, "Text to continue (BOS is put before it)");
  input->add_option("--chat", flags->chat, "Message to answer, through the chat template");
  input->add_option("--ids", flags->ids, "Token ids to continue: 1,2,3")->delimiter(',');
  input->require_option(1);
  command->add_option("--system", flags->system, "With --chat: system message");
  command->add_flag("--think", flags->think, "With --chat: think before answering");
  command->add_flag("--no-empty-think", flags->no_empty_think,
                    "With --chat: no empty <think></think> before the answer");
  command->add_flag("--no-bos", flags->no_bos, "With --prompt: no BOS before the text");
  command->add_option("--max-new-tokens", request.max_new_tokens, "New tokens at most")
      ->check(in_range(int64_t{1}, int64_t{1} << 30));
  command->add_option("--stop", request.stop_strings, "Stop before this text (may be given several times)")
      ->allow_extra_args(false);
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on after the end token");
  command->add_option("--logprobs", request.logprobs, "Log-probabilities of each token and of the N best (with --json)")
      ->check(in_range(0, 1000));
  auto* regex = command->add_option("--regex", flags->regex, "The answer must match this regular expression");
  command->add_option("--json-schema", flags->json_schema, "The answer must be JSON that this schema allows (a file)")
      ->excludes(regex);
  command->add_option("--weights", flags->weights, "f32, bf16, i8, or f16 (GPU); default: as --dtype computes");
  command->add_option("--ngram-draft", flags->ngram_draft, "Speculative decoding: tokens proposed from the text so far")
      ->check(in_range(0, 16));
  command->add_option("--samples", flags->samples, "Independent answers")->check(in_range(1, 100000));
  command->add_option("--prefill-chunk", flags->prefill_chunk, "Prompt tokens a pass")->check(in_range(1, 1 << 20));
  add_sampling_flags(command, request.sampling);
  add_device_flags(command, flags->device);
  add_common_flags(command, globals);
  command->callback([flags, &globals] { generate(*flags, globals); });
}

}  // namespace mm
