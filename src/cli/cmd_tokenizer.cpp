// `minimind tokenizer`: train, encode, decode, render chats, look inside.
#include <algorithm>
#include <cstdio>

#include "base/error.h"
#include "base/fs.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/thread_team.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "cli/line_map.h"
#include "cli/text_rows.h"
#include "text/bpe_trainer.h"
#include "text/chat_template.h"
#include "text/tokenizer_stats.h"

namespace mm {

namespace {

struct TokenizerFlags {
  std::string tokenizer, output, text, special = "minimind";
  std::vector<std::string> data;
  std::vector<int32_t> ids;
  int32_t vocab_size = 6400;
  int64_t min_frequency = 0, max_word_mib = 512;
  bool overwrite = false, jsonl = false, skip_special = false;
};

std::string read_standard_input() {
  constexpr size_t max_bytes = size_t{1} << 30;
  std::string out;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) {
    out.append(buffer, n);
    if (out.size() > max_bytes) throw Error("standard input", "one text of at most 1 GiB", "more", "pass --jsonl");
  }
  if (std::ferror(stdin) != 0) throw system_error("read failed", "standard input");
  return out;
}

void append_ids(const std::vector<int32_t>& ids, std::string& out) {
  out += '[';
  for (size_t i = 0; i < ids.size(); i++) {
    if (i > 0) out += ", ";
    fmt::format_to(std::back_inserter(out), "{}", ids[i]);
  }
  out += ']';
}

void append_text_line(const std::string& text, std::string& out) {
  out += "{\"text\": ";
  append_python_json(text, out);
  out += '}';
}

void check_id(int64_t id, const Tokenizer& tokenizer, const std::string& where) {
  if (id < 0 || id >= tokenizer.vocab_size()) {
    throw Error(where, fmt::format("ids from 0 to {}", tokenizer.vocab_size() - 1), std::to_string(id));
  }
}

void train(const TokenizerFlags& flags, const Globals& globals) {
  require_new_dir(flags.output, flags.overwrite);
  BpeTrainerOptions options;
  options.vocab_size = flags.vocab_size;
  options.min_frequency = flags.min_frequency;
  options.max_word_bytes = flags.max_word_mib << 20;
  if (flags.special == "chatml") options.special_tokens = chatml_special_tokens();
  const double start = now_seconds();
  BpeTrainer trainer(options);
  int64_t bytes = 0;
  const int64_t rows = stream_texts(flags.data, "read texts", [&](const std::vector<std::string>& texts) {
    for (const std::string& t : texts) bytes += static_cast<int64_t>(t.size());
    trainer.feed(std::vector<std::string_view>(texts.begin(), texts.end()));
  });
  const int64_t words = trainer.distinct_words();
  const Tokenizer tokenizer = trainer.train();
  if (tokenizer.vocab_size() < flags.vocab_size) {
    log_warn("the text has pairs for a vocabulary of {} only, not {}", tokenizer.vocab_size(), flags.vocab_size);
  }
  tokenizer.save(flags.output);
  ordered_json result;
  result["output"] = flags.output;
  result["vocab_size"] = tokenizer.vocab_size();
  result["rows"] = rows;
  result["bytes"] = bytes;
  result["distinct_words"] = words;
  result["dropped_words"] = trainer.dropped_words();
  result["seconds"] = now_seconds() - start;
  print_result(globals, result);
}

void encode(const TokenizerFlags& flags, const Globals& globals, bool has_text) {
  const Tokenizer tokenizer = Tokenizer::load(flags.tokenizer);
  if (flags.jsonl) {
    map_json_lines([&](const ordered_json& line, const std::string& where, std::string& out) {
      out += "{\"ids\": ";
      append_ids(tokenizer.encode(json_get<std::string>(line, "text", where)), out);
      out += '}';
    });
    return;
  }
  const std::vector<int32_t> ids = tokenizer.encode(has_text ? flags.text : read_standard_input());
  ordered_json pieces = ordered_json::array();
  for (const int32_t id : ids) pieces.push_back(tokenizer.decode({&id, 1}));
  ordered_json result;
  result["tokens"] = ids.size();
  result["ids"] = ids;
  result["pieces"] = pieces;
  print_result(globals, result);
}

void decode(const TokenizerFlags& flags, const Globals& globals) {
  const Tokenizer tokenizer = Tokenizer::load(flags.tokenizer);
  if (flags.jsonl) {
    map_json_lines([&](const ordered_json& line, const std::string& where, std::string& out) {
      const auto list = json_get<ordered_json>(line, "ids", where);
      if (!list.is_array()) throw Error(where + ": field \"ids\"", "a list of ids", json_type_name(list));
      std::vector<int32_t> ids;
      for (size_t i = 0; i < list.size(); i++) {
        const std::string here = fmt::format("{}: ids[{}]", where, i);
        if (!list[i].is_number_integer()) throw Error(here, "an integer", json_type_name(list[i]));
        const auto id = list[i].get<int64_t>();
        check_id(id, tokenizer, here);
        ids.push_back(static_cast<int32_t>(id));
      }
      append_text_line(tokenizer.decode(ids, flags.skip_special), out);
    });
    return;
  }
  for (const int32_t id : flags.ids) check_id(id, tokenizer, "--ids");
  ordered_json result;
  result["text"] = tokenizer.decode(flags.ids, flags.skip_special);
  print_result(globals, result);
}

void render(const TokenizerFlags& flags) {
  const Tokenizer tokenizer = Tokenizer::load(flags.tokenizer);
  if (!tokenizer.chat_template().empty() && tokenizer.chat_template() != minimind_chat_template()) {
    throw Error(flags.tokenizer, "MiniMind's chat template", "another one",
                "only that template is rendered; replace chat_template in tokenizer_config.json");
  }
  map_json_lines([](const ordered_json& line, const std::string& where, std::string& out) {
    ChatOptions options;
    options.add_generation_prompt = json_get_or(line, "add_generation_prompt", false, where);
    options.open_thinking = json_get_or(line, "open_thinking", false, where);
    const auto messages = json_get<ordered_json>(line, "messages", where);
    const auto tools = json_get_or(line, "tools", ordered_json(), where);
    append_text_line(render_chat(messages, tools, options, where + ": messages"), out);
  });
}

void stats(const TokenizerFlags& flags, const Globals& globals) {
  const Tokenizer tokenizer = Tokenizer::load(flags.tokenizer);
  TokenizerStats counts(tokenizer);
  int64_t rows = 0;
  if (!flags.data.empty()) {
    rows = stream_texts(flags.data, "count tokens", [&](const std::vector<std::string>& texts) {
      counts.add(std::vector<std::string_view>(texts.begin(), texts.end()));
    });
  }
  ordered_json result = counts.vocabulary();
  if (!flags.data.empty()) {
    result["rows"] = rows;
    result.update(counts.usage());
  }
  print_result(globals, result);
}

CLI::App* add_command(CLI::App& group, Globals& globals, const char* name, const char* help, const char* examples) {
  CLI::App* command = group.add_subcommand(name, help);
  command->footer(examples);
  add_common_flags(command, globals);
  return command;
}

}  // namespace

void add_tokenizer_commands(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<TokenizerFlags>();
  CLI::App* group = app.add_subcommand("tokenizer", "Train a tokenizer, use it, look inside it");
  group->require_subcommand(1);
  const auto tokenizer_flag = [&](CLI::App* command) {
    command->add_option("--tokenizer", flags->tokenizer, "Folder with tokenizer.json, or the file itself")->required();
  };

  CLI::App* t = add_command(
      *group, globals, "train", "Train a byte-level BPE tokenizer on data sets",
      "A tokenizer cuts text into the pieces that a model reads and writes. Training starts from the 256 bytes and\n"
      "joins the most frequent pair of neighbours, again and again, until the vocabulary is full. The result is a\n"
      "Hugging Face folder: tokenizer.json and tokenizer_config.json, chat template inside.\n\n"
      "Examples:\n"
      "  minimind tokenizer train --data pretrain.jsonl --vocab-size 6400 --output out/tokenizer\n"
      "  minimind tokenizer train --data a.jsonl.gz b.jsonl.zst --vocab-size 2000 --output out/tokenizer --overwrite");
  t->add_option("--data", flags->data, "Data sets (.jsonl, .gz, .zst): {\"text\"} or conversations")->required();
  t->add_option("--vocab-size", flags->vocab_size, "Tokens in all, special ones and the 256 bytes included");
  t->add_option("--output", flags->output, "Folder to write")->required();
  t->add_flag("--overwrite", flags->overwrite, "Write into a folder that already holds files");
  t->add_option("--special", flags->special, "Special tokens: MiniMind's 36, or ChatML's 3 only")
      ->check(CLI::IsMember({"minimind", "chatml"}));
  t->add_option("--min-frequency", flags->min_frequency, "Join pairs seen at least this often")->check(at_least(0));
  t->add_option("--max-word-mib", flags->max_word_mib,
                "Bound on distinct words kept in memory, MiB; beyond it the rarest are dropped")
      ->check(in_range(1, 1 << 20));
  t->callback([flags, &globals] { train(*flags, globals); });

  CLI::App* e = add_command(
      *group, globals, "encode", "Text to token ids",
      "Without --text and --jsonl, standard input is one text. --jsonl uses all cores and keeps the order.\n\n"
      "Examples:\n"
      "  minimind tokenizer encode --tokenizer out/tokenizer --text '你好, world'\n"
      "  minimind tokenizer encode --tokenizer out/tokenizer --jsonl < texts.jsonl > ids.jsonl");
  tokenizer_flag(e);
  CLI::Option* text = e->add_option("--text", flags->text, "The text");
  e->add_flag("--jsonl", flags->jsonl, "Read {\"text\"} lines on standard input, write {\"ids\"} lines")
      ->excludes(text);
  e->callback([flags, &globals, text] { encode(*flags, globals, text->count() > 0); });

  CLI::App* d = add_command(*group, globals, "decode", "Token ids to text",
                            "Examples:\n"
                            "  minimind tokenizer decode --tokenizer out/tokenizer --ids 1,320,2\n"
                            "  minimind tokenizer decode --tokenizer out/tokenizer --jsonl < ids.jsonl");
  tokenizer_flag(d);
  auto* source = d->add_option_group("source");
  source->add_option("--ids", flags->ids, "The ids, with commas between them")->delimiter(',');
  source->add_flag("--jsonl", flags->jsonl, "Read {\"ids\"} lines on standard input, write {\"text\"} lines");
  source->require_option(1);
  d->add_flag("--skip-special", flags->skip_special, "Leave out special tokens such as <|im_end|>");
  d->callback([flags, &globals] { decode(*flags, globals); });

  CLI::App* r = add_command(
      *group, globals, "template", "Conversations to the text that the model sees",
      "Reads {\"messages\", \"tools\", \"add_generation_prompt\", \"open_thinking\"} lines on standard input (all but\n"
      "messages optional), writes {\"text\"} lines.\n\n"
      "Example:\n"
      "  echo '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}], \"add_generation_prompt\": true}' |\n"
      "    minimind tokenizer template --tokenizer out/tokenizer --jsonl");
  tokenizer_flag(r);
  r->add_flag("--jsonl", flags->jsonl, "JSON lines in and out (the only form)")->required();
  r->callback([flags] { render(*flags); });

  CLI::App* s = add_command(*group, globals, "stats", "What a tokenizer holds and how well it compresses",
                            "Examples:\n"
                            "  minimind tokenizer stats --tokenizer out/tokenizer\n"
                            "  minimind tokenizer stats --tokenizer out/tokenizer --data valid.jsonl --json");
  tokenizer_flag(s);
  s->add_option("--data", flags->data, "Data sets to count on: bytes a token, languages, unused ids");
  s->callback([flags, &globals] { stats(*flags, globals); });
}

}  // namespace mm
