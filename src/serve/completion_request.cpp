// POST /v1/completions, /v1/embeddings, /tokenize and /detokenize.
#include <fmt/format.h>

#include "base/error.h"
#include "serve/json_text.h"
#include "serve/request_parts.h"
#include "text/chat_template.h"

namespace mm {

static constexpr size_t kMaxPrompts = 128, kMaxInputs = 2048;

ApiCall parse_completion_request(std::string_view body, const ApiContext& context) {
  const ordered_json content = parse_body(body);
  Fields fields(content, "");
  ApiCall call;
  call.kind = ApiCall::Kind::completion;
  call.model = model_name(fields, context);
  call.split_think = false;
  stream_fields(fields, call);
  EngineRequest request = generation_fields(fields, context, call);
  request.max_new_tokens = fields.integer("max_tokens", 0, INT32_MAX).value_or(16);
  if (const auto top = fields.integer("logprobs", 0, 20)) {
    call.logprobs = true;
    call.top_logprobs = static_cast<int>(*top);
    request.logprobs = *top;
  }
  const bool echo = fields.boolean("echo", false);
  if (echo && call.logprobs)
    throw invalid_value("echo", "log-probabilities of the prompt are not supported; leave out echo or logprobs.");
  if (const auto best = fields.integer("best_of", 1, context.max_choices); best && *best != call.n)
    throw invalid_value("best_of", "only the value of n is supported.");
  const bool add_bos = fields.boolean("add_special_tokens", true);
  request.grammar = format_grammar(fields);
  const ordered_json* prompt = fields.find("prompt");
  if (prompt == nullptr) throw missing("prompt");
  fields.refuse({"suffix", "use_beam_search", "min_tokens", "prompt_logprobs"});
  fields.ignore({"metadata", "service_tier"});
  fields.done();

  auto prompts = prompt_list(*prompt, context, "prompt", {.at_most = kMaxPrompts, .add_bos = add_bos});
  for (auto& ids : prompts) {
    if (echo) call.echo.push_back(context.tokenizer.decode(ids, request.skip_special));
    call.requests.push_back(request);
    call.requests.back().prompt = std::move(ids);
  }
  return call;
}

ApiCall parse_embedding_request(std::string_view body, const ApiContext& context) {
  const ordered_json content = parse_body(body);
  Fields fields(content, "");
  ApiCall call;
  call.kind = ApiCall::Kind::embedding;
  call.model = model_name(fields, context);
  const auto encoding = fields.string("encoding_format", 64);
  if (encoding && *encoding != "float" && *encoding != "base64")
    throw invalid_value("encoding_format", "float or base64 are expected.");
  call.base64 = encoding == "base64";
  EngineRequest request;
  request.embed = true;
  request.client = fields.string("user", 512).value_or("");
  request.priority = static_cast<int>(fields.integer("priority", -100, 100).value_or(0));
  request.deadline_seconds = context.request_seconds;
  const ordered_json* input = fields.find("input");
  if (input == nullptr) throw missing("input");
  call.dimensions = fields.integer("dimensions", 1, INT32_MAX).value_or(0);
  fields.done();
  for (auto& ids : prompt_list(*input, context, "input", {.at_most = kMaxInputs, .empty_text = false})) {
    call.requests.push_back(request);
    call.requests.back().prompt = std::move(ids);
  }
  return call;
}

std::string answer_tokenize(std::string_view body, const ApiContext& context) {
  const ordered_json content = parse_body(body);
  Fields fields(content, "");
  model_name(fields, context);
  const bool as_prompt = fields.find("content") == nullptr && fields.find("prompt") != nullptr;  // vLLM's name
  const ordered_json* text = fields.find(as_prompt ? "prompt" : "content");                      // llama.cpp's
  const bool special = fields.boolean("add_special", fields.boolean("add_special_tokens", false));
  const bool pieces = fields.boolean("with_pieces", fields.boolean("return_token_strs", false));
  const ordered_json* messages = fields.list("messages", 4096);
  const bool generation = fields.boolean("add_generation_prompt", true);
  const ordered_json* tools = fields.list("tools", 128);
  fields.done();
  std::string rendered;
  if (messages != nullptr) {
    try {
      rendered =
          render_chat(*messages, tools == nullptr ? ordered_json() : *tools, {.add_generation_prompt = generation});
    } catch (const Error& e) {
      throw bad_value(e.what(), "messages");
    }
  } else if (text == nullptr) {
    throw missing("content");
  } else if (!text->is_string()) {
    throw invalid_type(as_prompt ? "prompt" : "content", "a string", *text);
  } else {
    rendered = text->get_ref<const std::string&>();
  }
  std::vector<int32_t> ids = context.tokenizer.encode(rendered);
  const int32_t bos = context.tokenizer.bos_id();
  if (special && bos >= 0 && (ids.empty() || ids[0] != bos)) ids.insert(ids.begin(), bos);
  std::string out =
      fmt::format(R"({{"count":{},"max_model_len":{},"tokens":[{}])", ids.size(), context.context, fmt::join(ids, ","));
  if (pieces) {
    out += R"(,"token_strs":[)";
    for (size_t i = 0; i < ids.size(); i++) {
      if (i > 0) out += ',';
      append_json_string(context.tokenizer.token_bytes(ids[i]), out);
    }
    out += ']';
  }
  return out + "}";
}

std::string answer_detokenize(std::string_view body, const ApiContext& context) {
  const ordered_json content = parse_body(body);
  Fields fields(content, "");
  model_name(fields, context);
  const ordered_json* list = fields.list("tokens", 1 << 20);
  if (list == nullptr) throw missing("tokens");
  fields.done();
  std::vector<int32_t> ids;
  for (const auto& id : *list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(context.tokenizer.vocab_size()))
      throw invalid_value("tokens", fmt::format("token ids below {} are expected.", context.tokenizer.vocab_size()));
    ids.push_back(id.get<int32_t>());
  }
  std::string text;
  append_json_string(context.tokenizer.decode(ids), text);
  return fmt::format(R"({{"content":{},"prompt":{}}})", text, text);
}

}  // namespace mm
