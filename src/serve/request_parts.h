// What the parsers of the request bodies share.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "serve/api_request.h"
#include "serve/fields.h"

namespace mm {

ordered_json parse_body(std::string_view body);
std::string model_name(Fields& fields, const ApiContext& context);

// Temperature to stop ids, n, user and priority: everything but the prompt, tokens asked for and log-probabilities.
EngineRequest generation_fields(Fields& fields, const ApiContext& context, ApiCall& call);
void stream_fields(Fields& fields, ApiCall& call);

// response_format and guided_*; null where the text is free.
std::shared_ptr<const Grammar> format_grammar(Fields& fields);

// Ids of a text; ApiError when they are too many for the context (told without encoding when that is certain).
std::vector<int32_t> encode_prompt(std::string_view text, const ApiContext& context, const std::string& param);
// ApiError unless 1 <= ids < context and each is of the vocabulary.
void check_prompt(const std::vector<int32_t>& ids, const ApiContext& context, const std::string& param);
struct PromptRules {
  size_t at_most = 1;      // prompts
  bool add_bos = true;     // before texts without one
  bool empty_text = true;  // allowed, where a BOS stands for it
};
// A string, a list of strings, a list of ids or a list of lists of ids.
std::vector<std::vector<int32_t>> prompt_list(const ordered_json& value, const ApiContext& context,
                                              const std::string& param, const PromptRules& rules);

}  // namespace mm
