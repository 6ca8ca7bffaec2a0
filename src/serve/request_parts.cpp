#include "serve/request_parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <random>

#include "base/error.h"

namespace mm {

ApiContext::ApiContext(Tokenizer t) : tokenizer(std::move(t)) {
  for (int32_t id = 0; id < tokenizer.vocab_size(); id++)
    max_token_bytes = std::max(max_token_bytes, tokenizer.token_bytes(id).size());
  think_open = tokenizer.token_to_id("<think>").value_or(-1);
  think_close = tokenizer.token_to_id("</think>").value_or(-1);
}

// Objects keep their keys in a list, so reading one takes the square of its width.
static void check_width(std::string_view body) {
  constexpr int max_keys = 1024;
  std::vector<int> keys;
  bool in_string = false;
  for (size_t i = 0; i < body.size(); i++) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') i++;
      else if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      keys.push_back(0);
    } else if (c == '}' || c == ']') {
      if (!keys.empty()) keys.pop_back();
    } else if (c == ':' && !keys.empty() && ++keys.back() > max_keys) {
      throw ApiError(400, "invalid_json", "", fmt::format("An object of the body has more than {} fields.", max_keys));
    }
  }
}

ordered_json parse_body(std::string_view body) {
  check_width(body);
  try {
    return parse_json(body, "body");
  } catch (const Error& e) {
    throw ApiError(400, "invalid_json", "",
                   std::string("We could not parse the JSON body of your request: ") + e.what());
  }
}

std::string model_name(Fields& fields, const ApiContext& context) {
  const auto name = fields.string("model", 512);
  if (!name) return context.names.front();
  const auto& names = context.names;
  if (std::find(names.begin(), names.end(), *name) == names.end() &&
      std::find(names.begin(), names.end(), "*") == names.end()) {
    throw ApiError(404, "model_not_found", "model",
                   fmt::format("The model '{}' does not exist; this server has '{}'.", *name, names.front()));
  }
  return *name;
}

static void stop_strings(Fields& fields, std::vector<std::string>& stops) {
  constexpr size_t max_stops = 16, max_bytes = 1024;
  const ordered_json* v = fields.find("stop");
  if (v == nullptr) return;
  const auto take = [&](const ordered_json& s, const std::string& param) {
    if (!s.is_string()) throw invalid_type(param, "a string or an array of strings", s);
    const auto& text = s.get_ref<const std::string&>();
    if (text.empty() || text.size() > max_bytes)
      throw invalid_value(param, fmt::format("a stop string has 1 to {} bytes.", max_bytes));
    stops.push_back(text);
  };
  if (!v->is_array()) {
    take(*v, "stop");
    return;
  }
  const ordered_json* items = fields.list("stop", max_stops);
  for (size_t i = 0; i < items->size(); i++) take((*items)[i], fmt::format("stop[{}]", i));
}

static void logit_bias(Fields& fields, const ApiContext& context, EngineRequest& request) {
  const ordered_json* biases = fields.object("logit_bias");
  if (biases == nullptr) return;
  const int32_t n_vocab = context.tokenizer.vocab_size();
  for (const auto& [key, value] : biases->items()) {
    const std::string param = "logit_bias." + key;
    int32_t id = -1;
    const auto [end, ec] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (ec != std::errc() || end != key.data() + key.size() || id < 0 || id >= n_vocab)
      throw invalid_value(param, fmt::format("keys are token ids below {}.", n_vocab));
    if (!value.is_number()) throw invalid_type(param, "a number", value);
    const auto bias = value.get<double>();
    if (!(bias >= -100 && bias <= 100)) throw invalid_value(param, "biases lie between -100 and 100.");
    request.logit_bias.emplace_back(id, static_cast<float>(bias));
  }
}

static void stop_token_ids(Fields& fields, const ApiContext& context, EngineRequest& request) {
  const ordered_json* ids = fields.list("stop_token_ids", 64);
  if (ids == nullptr) return;
  for (const auto& id : *ids) {
    const bool fits =
        id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(context.tokenizer.vocab_size());
    if (!fits) throw invalid_value(fields.path("stop_token_ids"), "token ids of the vocabulary are expected.");
    request.stop_ids.push_back(id.get<int32_t>());
  }
}

static uint64_t random_seed() {
  thread_local std::mt19937_64 source{(uint64_t{std::random_device{}()} << 32) ^ std::random_device{}()};
  return source();
}

EngineRequest generation_fields(Fields& fields, const ApiContext& context, ApiCall& call) {
  EngineRequest r;
  SamplingParams& s = r.sampling = context.sampling;
  const auto real = [&](const char* name, float& value, double low, double high) {
    if (const auto v = fields.number(name, low, high)) {
      value = static_cast<float>(*v);
      return true;
    }
    return false;
  };
  if (real("temperature", s.temperature, 0, 2)) s.greedy = false;
  real("top_p", s.top_p, 0, 1);
  if (s.top_p <= 0) s.top_p = 1e-6f;  // the most probable token alone, as OpenAI takes 0
  real("min_p", s.min_p, 0, 1);
  real("repetition_penalty", s.repetition_penalty, 0.01, 100);
  real("presence_penalty", s.presence_penalty, -2, 2);
  real("frequency_penalty", s.frequency_penalty, -2, 2);
  if (const auto k = fields.integer("top_k", -1, INT32_MAX)) s.top_k = static_cast<int32_t>(std::max<int64_t>(*k, 0));
  const auto seed = fields.integer("seed", INT64_MIN, INT64_MAX);
  s.seed = seed ? static_cast<uint64_t>(*seed) : random_seed();

  call.n = r.n = static_cast<int>(fields.integer("n", 1, context.max_choices).value_or(1));
  if (!fields.boolean("ignore_eos", false)) r.stop_ids = context.stop_ids;
  stop_strings(fields, r.stop_strings);
  stop_token_ids(fields, context, r);
  logit_bias(fields, context, r);
  r.skip_special = fields.boolean("skip_special_tokens", true);
  r.client = fields.string("user", 512).value_or("");
  r.priority = static_cast<int>(fields.integer("priority", -100, 100).value_or(0));
  r.deadline_seconds = context.request_seconds;
  return r;
}

void stream_fields(Fields& fields, ApiCall& call) {
  call.stream = fields.boolean("stream", false);
  const ordered_json* options = fields.object("stream_options");
  if (options == nullptr) return;
  if (!call.stream) throw invalid_value("stream_options", "it is only allowed together with \"stream\": true.");
  Fields inner(*options, "stream_options");
  call.include_usage = inner.boolean("include_usage", false);
  inner.ignore({"include_obfuscation"});
  inner.done();
}

static std::shared_ptr<const Grammar> schema_format(const ordered_json& format) {
  const std::string here = "response_format.json_schema";
  const auto it = format.find("json_schema");
  if (it == format.end()) throw missing(here);
  Fields inner(*it, here);
  inner.ignore({"name", "description", "strict"});
  const ordered_json* schema = inner.find("schema");
  inner.done();
  if (schema == nullptr) throw missing(here + ".schema");
  return Grammar::json_schema(*schema, here + ".schema");
}

std::shared_ptr<const Grammar> format_grammar(Fields& fields) {
  std::shared_ptr<const Grammar> grammar;
  const auto take = [&](const char* param, std::shared_ptr<const Grammar> g) {
    if (grammar != nullptr)
      throw invalid_value(param, "only one of response_format, guided_json and guided_regex may be given.");
    grammar = std::move(g);
  };
  try {
    if (const ordered_json* format = fields.object("response_format")) {
      Fields inner(*format, "response_format");
      const auto type = inner.string("type", 64);
      if (!type) throw missing("response_format.type");
      inner.find("json_schema");
      const auto pattern = inner.string("pattern", 1 << 16);
      inner.done();
      if (*type == "json_object") take("response_format", Grammar::json_object());
      else if (*type == "json_schema") take("response_format", schema_format(*format));
      else if (*type == "regex" && !pattern) throw missing("response_format.pattern");
      else if (*type == "regex") take("response_format", Grammar::regex(*pattern, "response_format.pattern"));
      else if (*type != "text")
        throw invalid_value("response_format.type", "supported are text, json_object, json_schema and regex.");
    }
    if (const auto pattern = fields.string("guided_regex", 1 << 16))
      take("guided_regex", Grammar::regex(*pattern, "guided_regex"));
    if (const ordered_json* schema = fields.find("guided_json")) {
      take("guided_json",
           schema->is_string()
               ? Grammar::json_schema(parse_json(schema->get_ref<const std::string&>(), "guided_json"), "guided_json")
               : Grammar::json_schema(*schema, "guided_json"));
    }
  } catch (const Error& e) {
    throw bad_value(e.what(), "response_format");
  }
  return grammar;
}

static ApiError too_long(const ApiContext& context, const std::string& param, const std::string& count) {
  return {400, "context_length_exceeded", param,
          fmt::format("This model's maximum context length is {} tokens, of which at least one is for the answer. "
                      "However, your prompt has {} tokens. Please shorten it.",
                      context.context, count)};
}

void check_prompt(const std::vector<int32_t>& ids, const ApiContext& context, const std::string& param) {
  if (ids.empty()) throw invalid_value(param, "at least one token is expected.");
  if (static_cast<int64_t>(ids.size()) >= context.context)
    throw too_long(context, param, fmt::format("{}", ids.size()));
  for (const int32_t id : ids) {
    if (id < 0 || id >= context.tokenizer.vocab_size())
      throw invalid_value(param, fmt::format("{} is not a token id below {}.", id, context.tokenizer.vocab_size()));
  }
}

std::vector<int32_t> encode_prompt(std::string_view text, const ApiContext& context, const std::string& param) {
  const size_t at_least = text.size() / context.max_token_bytes;
  if (static_cast<int64_t>(at_least) >= context.context)
    throw too_long(context, param, fmt::format("over {}", at_least));
  std::vector<int32_t> ids = context.tokenizer.encode(text);
  check_prompt(ids, context, param);
  return ids;
}

static std::vector<int32_t> id_list(const ordered_json& list, const ApiContext& context, const std::string& param) {
  if (static_cast<int64_t>(list.size()) >= context.context)
    throw too_long(context, param, fmt::format("{}", list.size()));
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const auto& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX)
      throw invalid_type(param, "token ids (whole numbers from 0)", id);
    ids.push_back(id.get<int32_t>());
  }
  check_prompt(ids, context, param);
  return ids;
}

static std::vector<int32_t> text_prompt(const std::string& text, const ApiContext& context, const std::string& param,
                                        const PromptRules& rules) {
  const int32_t bos = rules.add_bos ? context.tokenizer.bos_id() : -1;
  if (text.empty() && (bos < 0 || !rules.empty_text)) throw invalid_value(param, "the text is empty.");
  if (text.empty()) return {bos};
  std::vector<int32_t> ids = encode_prompt(text, context, param);
  if (bos >= 0 && ids[0] != bos) ids.insert(ids.begin(), bos);
  check_prompt(ids, context, param);
  return ids;
}

std::vector<std::vector<int32_t>> prompt_list(const ordered_json& value, const ApiContext& context,
                                              const std::string& param, const PromptRules& rules) {
  if (value.is_string()) return {text_prompt(value.get_ref<const std::string&>(), context, param, rules)};
  if (!value.is_array()) throw invalid_type(param, "a string, an array of strings, or an array of token ids", value);
  if (value.empty()) throw invalid_value(param, "the list is empty.");
  if (value[0].is_number()) return {id_list(value, context, param)};
  if (value.size() > rules.at_most) {
    throw ApiError(400, "array_above_max_length", param,
                   fmt::format("Invalid '{}': array too long. Expected at most {} prompts, but got {}.", param,
                               rules.at_most, value.size()));
  }
  std::vector<std::vector<int32_t>> prompts;
  for (size_t i = 0; i < value.size(); i++) {
    const std::string here = fmt::format("{}[{}]", param, i);
    if (value[i].is_string())
      prompts.push_back(text_prompt(value[i].get_ref<const std::string&>(), context, here, rules));
    else if (value[i].is_array()) prompts.push_back(id_list(value[i], context, here));
    else throw invalid_type(here, "a string or an array of token ids", value[i]);
  }
  return prompts;
}

}  // namespace mm
