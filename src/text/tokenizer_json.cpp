#include "text/tokenizer_json.h"

#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "base/json.h"
#include "text/unicode.h"

namespace mm {

namespace {

constexpr int64_t kMaxId = 1'000'000;  // bounds what a hostile file can make us allocate

// Typed access to sorted objects; `where` ends as "file: model.vocab".
struct Node {
  const json* value;
  std::string where;

  bool has(const char* key) const { return value->is_object() && value->contains(key) && !(*value)[key].is_null(); }
  Node at(const char* key) const {
    if (!value->is_object()) throw Error(where, "a JSON object", type());
    const auto it = value->find(key);
    if (it == value->end()) throw Error(where, fmt::format("field \"{}\"", key), "none");
    return {&*it, fmt::format("{}: {}", where, key)};
  }
  Node item(size_t i) const { return {&(*value)[i], fmt::format("{}[{}]", where, i)}; }
  std::string type() const {
    if (value->is_object()) return "an object";
    return value->is_array() ? "a list" : json_type_name(ordered_json(*value));
  }
  std::string text() const {
    if (!value->is_string()) throw Error(where, "a string", type());
    return value->get<std::string>();
  }
  bool flag(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    const Node n = at(key);
    if (!n.value->is_boolean()) throw Error(n.where, "true or false", n.type());
    return n.value->get<bool>();
  }
  int32_t id() const {
    if (!value->is_number_integer()) throw Error(where, "a token id", type());
    const bool fits = value->is_number_unsigned() ? value->get<uint64_t>() < static_cast<uint64_t>(kMaxId) : false;
    if (!fits) throw Error(where, fmt::format("a token id from 0 to {}", kMaxId - 1), value->dump());
    return value->get<int32_t>();
  }
};

[[noreturn]] void unsupported(const Node& n, const std::string& expected) {
  std::string found = n.value->is_object() && n.value->contains("type") ? (*n.value)["type"].dump() : n.value->dump();
  if (found.size() > 80) found = found.substr(0, 80) + "...";
  throw Error(n.where, expected, found, "only byte-level BPE tokenizers as GPT-2's and MiniMind's are supported");
}

void require_null(const Node& parent, const char* key) {
  if (parent.has(key)) unsupported(parent.at(key), "null");
}

void require_false(const Node& parent, const char* key) {
  if (parent.flag(key, false)) unsupported(parent.at(key), "false");
}

// These move offsets and add BOS or EOS around a text; encode() does neither, as its contract says.
void check_post_processor(const Node& post) {
  const json type = post.value->is_object() ? post.value->value("type", json()) : json();
  if (type == "Sequence") {
    const Node list = post.at("processors");
    if (!list.value->is_array()) throw Error(list.where, "a list", list.type());
    for (size_t i = 0; i < list.value->size(); i++) check_post_processor(list.item(i));
  } else if (type != "ByteLevel" && type != "TemplateProcessing") {
    unsupported(post, "null, ByteLevel, TemplateProcessing or a Sequence of them");
  }
}

void check_features(const Node& root, const Node& model) {
  // "truncation" and "padding" shape batches and do not change what a text encodes to.
  require_null(root, "normalizer");
  const Node pre = root.at("pre_tokenizer");
  if (!pre.value->is_object() || pre.value->value("type", json()) != "ByteLevel") unsupported(pre, "ByteLevel");
  require_false(pre, "add_prefix_space");
  if (!pre.flag("use_regex", true)) unsupported(pre.at("use_regex"), "true");
  const Node decoder = root.at("decoder");
  if (!decoder.value->is_object() || decoder.value->value("type", json()) != "ByteLevel")
    unsupported(decoder, "ByteLevel");
  if (root.has("post_processor")) check_post_processor(root.at("post_processor"));
  if (model.has("type") && model.at("type").text() != "BPE") unsupported(model.at("type"), "\"BPE\"");
  if (model.has("dropout") && *model.at("dropout").value != 0.0) unsupported(model.at("dropout"), "null");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(key) && !model.at(key).text().empty()) unsupported(model.at(key), "null");
  }
  require_false(model, "byte_fallback");
  require_false(model, "ignore_merges");
}

using Ids = std::unordered_map<std::string, int32_t>;

void set_token(TokenizerSpec& spec, Ids& ids, const std::string& content, int32_t id, const std::string& where) {
  if (content.empty()) throw Error(where, "a token of at least one character", "an empty one");
  if (spec.tokens.size() <= static_cast<size_t>(id)) spec.tokens.resize(static_cast<size_t>(id) + 1);
  std::string& slot = spec.tokens[static_cast<size_t>(id)];
  if (!slot.empty() && slot != content) {
    throw Error(where, "every id used once", fmt::format("id {} for both {} and {}", id, slot, content));
  }
  slot = content;
  ids.emplace(content, id);
}

void read_merges(const Node& list, const Ids& ids, TokenizerSpec& spec) {
  if (!list.value->is_array()) throw Error(list.where, "a list", list.type());
  if (list.value->size() > BpeMerger::kMaxMerges) {
    throw Error(list.where, fmt::format("at most {} merges", BpeMerger::kMaxMerges),
                std::to_string(list.value->size()));
  }
  spec.merges.reserve(list.value->size());
  const auto id_of = [&](const std::string& token, size_t i) {
    const auto it = ids.find(token);
    if (it == ids.end()) throw Error(list.item(i).where, "tokens of the vocabulary", "\"" + token + "\"");
    return it->second;
  };
  for (size_t i = 0; i < list.value->size(); i++) {
    const json& merge = (*list.value)[i];
    std::string left, right;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else if (merge.is_string()) {
      const auto& line = merge.get_ref<const std::string&>();
      if (line.starts_with("#version")) continue;
      const size_t space = line.find(' ');
      if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
        throw Error(list.item(i).where, "two tokens and one space between them", "\"" + line + "\"");
      }
      left = line.substr(0, space);
      right = line.substr(space + 1);
    } else {
      throw Error(list.item(i).where, "[\"left\", \"right\"] or \"left right\"", list.item(i).type());
    }
    const int32_t l = id_of(left, i), r = id_of(right, i);
    spec.merges.push_back({l, r, id_of(left + right, i)});
  }
}

AddedToken read_added(const Node& n) {
  AddedToken t;
  t.content = n.at("content").text();
  if (t.content.empty()) throw Error(n.at("content").where, "at least one character", "an empty string");
  t.special = n.flag("special", false);
  t.lstrip = n.flag("lstrip", false);
  t.rstrip = n.flag("rstrip", false);
  t.normalized = n.flag("normalized", !t.special);
  require_false(n, "single_word");
  return t;
}

void add_token(TokenizerSpec& spec, Ids& ids, AddedToken t, const std::string& where) {
  const auto known = ids.find(t.content);
  if (known != ids.end() && known->second != t.id) {
    throw Error(where, fmt::format("id {} for \"{}\" as in the vocabulary", known->second, t.content),
                std::to_string(t.id));
  }
  set_token(spec, ids, t.content, t.id, where);
  for (AddedToken& old : spec.added) {
    if (old.id == t.id) {
      old = std::move(t);
      return;
    }
  }
  spec.added.push_back(std::move(t));
}

// bos_token and its like: a string, or an object with "content".
std::string named_token(const Node& config, const char* key, const Ids& ids) {
  if (!config.has(key)) return "";
  const Node n = config.at(key);
  std::string content = n.value->is_object() ? n.at("content").text() : n.text();
  if (!content.empty() && !ids.contains(content))
    throw Error(n.where, "a token of the vocabulary", "\"" + content + "\"");
  return content;
}

std::string read_chat_template(const Node& config) {
  if (!config.has("chat_template")) return "";
  const Node n = config.at("chat_template");
  if (n.value->is_string()) return n.text();
  if (n.value->is_array()) {  // [{"name", "template"}, ...]
    for (size_t i = 0; i < n.value->size(); i++) {
      if (n.item(i).at("name").text() == "default") return n.item(i).at("template").text();
    }
  }
  throw Error(n.where, "a string, or a list with a template named \"default\"", n.type());
}

void read_config(const Node& config, Ids& ids, TokenizerSpec& spec) {
  if (!config.value->is_object()) throw Error(config.where, "a JSON object", config.type());
  if (config.has("added_tokens_decoder")) {
    const Node decoder = config.at("added_tokens_decoder");
    if (!decoder.value->is_object()) throw Error(decoder.where, "an object of id: token", decoder.type());
    for (const auto& [key, value] : decoder.value->items()) {
      const Node n{&value, decoder.where + "[" + key + "]"};
      if (key.empty() || key.size() > 6 ||
          !std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; })) {
        throw Error(n.where, "a token id as the key", "\"" + key + "\"");
      }
      AddedToken t = read_added(n);
      t.id = std::stoi(key);
      add_token(spec, ids, std::move(t), n.where);
    }
  }
  spec.bos = named_token(config, "bos_token", ids);
  spec.eos = named_token(config, "eos_token", ids);
  spec.pad = named_token(config, "pad_token", ids);
  spec.unk = named_token(config, "unk_token", ids);
  spec.chat_template = read_chat_template(config);
}

ordered_json added_token_json(const AddedToken& t, bool with_id) {
  ordered_json j;
  if (with_id) j["id"] = t.id;
  j["content"] = t.content;
  j["single_word"] = false;
  j["lstrip"] = t.lstrip;
  j["rstrip"] = t.rstrip;
  j["normalized"] = t.normalized;
  j["special"] = t.special;
  return j;
}

}  // namespace

TokenizerSpec parse_tokenizer(std::string_view tokenizer_json, std::string_view config_json, const std::string& where) {
  const json parsed = parse_large_json(tokenizer_json, where);
  const Node root{&parsed, where};
  const Node model = root.at("model");
  if (!model.value->is_object()) throw Error(model.where, "a JSON object", model.type());
  check_features(root, model);

  TokenizerSpec spec;
  Ids ids;
  const Node vocab = model.at("vocab");
  if (!vocab.value->is_object()) throw Error(vocab.where, "an object of token: id", vocab.type());
  ids.reserve(vocab.value->size() * 2);
  for (const auto& [token, id] : vocab.value->items()) {
    const Node n{&id, vocab.where};
    set_token(spec, ids, token, n.id(), vocab.where);
  }
  read_merges(model.at("merges"), ids, spec);
  if (root.has("added_tokens")) {
    const Node added = root.at("added_tokens");
    if (!added.value->is_array()) throw Error(added.where, "a list", added.type());
    for (size_t i = 0; i < added.value->size(); i++) {
      const Node n = added.item(i);
      AddedToken t = read_added(n);
      t.id = n.at("id").id();
      add_token(spec, ids, std::move(t), n.where);
    }
  }
  for (int b = 0; b < 256; b++) {
    std::string token;
    append_utf8(printable_of_byte(static_cast<uint8_t>(b)), token);
    if (!ids.contains(token)) {
      throw Error(vocab.where, "a token for each of the 256 bytes",
                  fmt::format("none for byte 0x{:02X} (\"{}\")", b, token),
                  "train with the ByteLevel alphabet as the initial alphabet");
    }
  }
  if (!config_json.empty()) {
    const std::string config_where = where + " (tokenizer_config.json)";
    const json config = parse_large_json(config_json, config_where);
    read_config({&config, config_where}, ids, spec);
  }
  return spec;
}

std::string write_tokenizer_json(const TokenizerSpec& spec) {
  // The vocabulary is written by hand in id order: an ordered_json of many keys is slow to fill.
  const auto quote = [](const std::string& s) { return json(s).dump(); };
  ordered_json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [";
  const char* comma = "\n    ";
  for (const AddedToken& t : spec.added) {
    out += comma + added_token_json(t, true).dump();
    comma = ",\n    ";
  }
  out +=
      "\n  ],\n  \"normalizer\": null,\n  \"pre_tokenizer\": " + byte_level.dump() + ",\n  \"post_processor\": null,\n";
  byte_level["add_prefix_space"] = true;  // as HF writes its decoder; without effect there
  out += "  \"decoder\": " + byte_level.dump() +
         ",\n  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n"
         "    \"unk_token\": null,\n    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
         "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n    \"vocab\": {";
  comma = "\n      ";
  for (size_t id = 0; id < spec.tokens.size(); id++) {
    if (spec.tokens[id].empty()) continue;
    out += fmt::format("{}{}: {}", comma, quote(spec.tokens[id]), id);
    comma = ",\n      ";
  }
  out += "\n    },\n    \"merges\": [";
  comma = "\n      ";
  for (const BpeMerger::Merge& m : spec.merges) {
    out += fmt::format("{}[{}, {}]", comma, quote(spec.tokens[static_cast<size_t>(m.left)]),
                       quote(spec.tokens[static_cast<size_t>(m.right)]));
    comma = ",\n      ";
  }
  return out + "\n    ]\n  }\n}\n";
}

std::string write_tokenizer_config(const TokenizerSpec& spec) {
  ordered_json config;
  config["add_bos_token"] = false;
  config["add_eos_token"] = false;
  config["add_prefix_space"] = false;
  config["added_tokens_decoder"] = ordered_json::object();
  ordered_json special = ordered_json::array();
  for (const AddedToken& t : spec.added) {
    config["added_tokens_decoder"][std::to_string(t.id)] = added_token_json(t, false);
    if (t.special && t.content != spec.pad) special.push_back(t.content);
  }
  config["additional_special_tokens"] = special;
  const auto name = [&](const char* key, const std::string& content) {
    config[key] = content.empty() ? ordered_json(nullptr) : ordered_json(content);
  };
  name("bos_token", spec.bos);
  config["clean_up_tokenization_spaces"] = false;
  name("eos_token", spec.eos);
  config["model_max_length"] = 131072;
  name("pad_token", spec.pad);
  config["spaces_between_special_tokens"] = false;
  config["tokenizer_class"] = "PreTrainedTokenizerFast";
  name("unk_token", spec.unk);
  if (!spec.chat_template.empty()) config["chat_template"] = spec.chat_template;
  return config.dump(2) + "\n";
}

}  // namespace mm
