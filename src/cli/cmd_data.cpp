// `minimind data`: is a data set what training expects, and what does a row become?
#include <unistd.h>

#include <cstdlib>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "data/report.h"

namespace mm {

namespace {

struct DataFlags {
  std::vector<std::string> files;
  std::string file, tokenizer, color = "auto";
  int64_t max_len = 512, line = 1;
  double empty_think_ratio = 0.2, system_ratio = 0.2;
  uint64_t seed = 42;

  SampleOptions options() const {
    SampleOptions o;
    o.max_len = max_len;
    o.empty_think_ratio = empty_think_ratio;
    o.system_ratio = system_ratio;
    o.seed = seed;
    return o;
  }
};

const char* kind_hint(SampleKind kind) {
  switch (kind) {
    case SampleKind::pretrain: return "pretrain: texts, for `minimind pretrain`";
    case SampleKind::chat: return "chat: conversations, for `minimind sft`";
    case SampleKind::preference: return "preference: a chosen and a rejected conversation a row";
    case SampleKind::prompt: return "prompt: conversations to be answered, with the answer";
  }
  return "?";
}

std::string share(int64_t part, int64_t whole) {
  return fmt::format("{} ({:.2f}%)", part,
                     whole > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0.0);
}

void print_report(const DataReport& r, int64_t max_len) {
  const auto line = [](const char* name, const std::string& value) {
    print_line(fmt::format("  {:<18}{}", name, value));
  };
  print_line(r.path);
  line("kind", kind_hint(r.kind));
  line("rows", std::to_string(r.rows.rows));
  if (r.tokenized) {
    const int64_t sequences = static_cast<int64_t>(r.lengths.size());
    line("tokens", fmt::format("{}, targets of the loss {}", r.tokens, share(r.targets, r.tokens)));
    line("tokens a row", fmt::format("median {}, 90% {}, 95% {}, 99% {}, longest {} (line {})", r.length_percentile(50),
                                     r.length_percentile(90), r.length_percentile(95), r.length_percentile(99),
                                     r.length_percentile(100), r.longest_line));
    line("cut", fmt::format("{} longer than --max-len {}", share(r.truncated, sequences), max_len));
    if (r.without_targets > 0)
      line("nothing to learn", share(r.without_targets, sequences) + " cut before the answer begins");
  }
  line("bad rows", r.rows.bad == 0 ? "none" : share(r.rows.bad, r.rows.rows));
  for (const BadRow& b : r.rows.first) print_line("    " + b.text({r.path}));
  if (r.rows.bad > static_cast<int64_t>(r.rows.first.size())) {
    print_line(fmt::format("    and {} more", r.rows.bad - static_cast<int64_t>(r.rows.first.size())));
  }
}

void check(const DataFlags& flags, const Globals& globals) {
  std::optional<Tokenizer> tokenizer;
  if (!flags.tokenizer.empty()) tokenizer = Tokenizer::load(flags.tokenizer);
  ordered_json files = ordered_json::array();
  int64_t rows = 0, bad = 0, tokens = 0, targets = 0;
  for (const std::string& path : flags.files) {
    const DataReport r = report_data(path, tokenizer ? &*tokenizer : nullptr, flags.options());
    if (r.rows.rows == 0) throw Error(path, "at least one row", "an empty file");
    if (!globals.json) print_report(r, flags.max_len);
    files.push_back(r.to_json());
    rows += r.rows.rows;
    bad += r.rows.bad;
    tokens += r.tokens;
    targets += r.targets;
  }
  if (globals.json) {
    ordered_json result = {{"rows", rows}, {"bad_rows", bad}};
    if (tokenizer) {
      result["tokens"] = tokens;
      result["targets"] = targets;
    }
    result["files"] = files;
    print_result(globals, result);
  }
  if (bad > 0) throw CLI::RuntimeError(1);
}

// Line ends visible; other control characters as \x1b: a data set must not steer the terminal.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') out += "\xe2\x86\xb5\n";  // U+21B5
    else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    else out += c;
  }
  return out;
}

std::string paint(const std::vector<TokenPiece>& pieces, bool color) {
  std::string out;
  bool inside = false, odd = false;
  for (const TokenPiece& p : pieces) {
    if (color) {  // shades alternate from token to token: 92/32 green, 37/90 grey
      out += fmt::format("\x1b[{}m{}\x1b[0m", p.is_target ? (odd ? 92 : 32) : (odd ? 37 : 90), printable(p.text));
      odd = !odd;
      continue;
    }
    if (p.is_target != inside) out += p.is_target ? "\xe2\x9f\xa6" : "\xe2\x9f\xa7";  // U+27E6, U+27E7
    inside = p.is_target;
    out += printable(p.text);
  }
  return out + (inside ? "\xe2\x9f\xa7" : "");
}

void show(const DataFlags& flags, const Globals& globals) {
  const Tokenizer tokenizer = Tokenizer::load(flags.tokenizer);
  SampleOptions options = flags.options();
  options.kind = detect_kind(flags.file);
  const SampleEncoder encoder(tokenizer, options);
  const std::string line = read_data_line(flags.file, flags.line);
  std::vector<TokenSequence> sequences;
  Sample sample;
  try {
    SampleParser parser;
    sample = parser.parse(line, options.kind);
    sequences = encoder.encode(sample, row_number(0, flags.line));
  } catch (const Error& e) {
    throw Error(fmt::format("{}:{}: {}", flags.file, flags.line, e.what()));
  }
  const bool pair = options.kind == SampleKind::preference;
  const bool color = flags.color == "always" ||
                     (flags.color == "auto" && ::isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr);
  ordered_json list = ordered_json::array();
  for (size_t i = 0; i < sequences.size(); i++) {
    const TokenSequence& s = sequences[i];
    const int64_t targets = std::count(s.is_target.begin(), s.is_target.end(), 1);
    if (globals.json) {
      ordered_json j;
      if (pair) j["side"] = i == 0 ? "chosen" : "rejected";
      j["full_length"] = s.full_len;
      j["targets"] = targets;
      j["ids"] = s.ids;
      j["tokens"] = ordered_json::array();
      for (const int32_t id : s.ids) j["tokens"].push_back(std::string(tokenizer.token_bytes(id)));
      j["is_target"] = ordered_json::array();
      for (const uint8_t t : s.is_target) j["is_target"].push_back(t != 0);
      list.push_back(std::move(j));
      continue;
    }
    print_line(fmt::format(
        "{}:{}  {}{}, {} tokens{}, {} targets", flags.file, flags.line, kind_name(options.kind),
        pair ? (i == 0 ? ", chosen" : ", rejected") : "", s.ids.size(),
        s.full_len > static_cast<int64_t>(s.ids.size()) ? fmt::format(" (cut from {})", s.full_len) : "", targets));
    print_line(paint(token_pieces(tokenizer, s), color));
    print_line("");
  }
  if (globals.json) {
    ordered_json result = {{"file", flags.file}, {"line", flags.line}, {"kind", kind_name(options.kind)}};
    if (options.kind == SampleKind::prompt) result["answer"] = sample.answer;
    if (pair) result["sequences"] = list;
    else result.update(list[0]);
    print_result(globals, result);
    return;
  }
  if (options.kind == SampleKind::prompt) print_line("answer: " + printable(sample.answer));
  print_line(
      color
          ? "\x1b[32mgreen\x1b[0m: the loss counts here (the model learns to write this); \x1b[90mgrey\x1b[0m: read "
            "only; "
            "shades alternate from token to token; \xe2\x86\xb5: line end"
          : "\xe2\x9f\xa6 \xe2\x9f\xa7: the loss counts here (the model learns to write this); the rest is read only; "
            "\xe2\x86\xb5: line end");
}

void add_sample_flags(CLI::App* command, const std::shared_ptr<DataFlags>& flags) {
  command->add_option("--max-len", flags->max_len, "Tokens a row at most; the rest is cut")
      ->check(in_range(2, 1 << 24));
  command
      ->add_option("--empty-think-ratio", flags->empty_think_ratio,
                   "Share of conversations that keep an empty <think></think> before answers")
      ->check(in_range(0.0, 1.0));
  command
      ->add_option("--system-ratio", flags->system_ratio,
                   "Share of conversations without system message that get a general one")
      ->check(in_range(0.0, 1.0));
  command->add_option("--seed", flags->seed, "Of these choices; as in training, a row's depend on seed and line alone");
}

}  // namespace

void add_data_commands(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<DataFlags>();
  CLI::App* group = app.add_subcommand("data", "Check data sets, look at what rows become");
  group->require_subcommand(1);

  CLI::App* c = group->add_subcommand("check", "Validate data sets, count rows, tokens and bad rows");
  c->footer(
      "A data set is JSON lines, one object a line, plain or .gz or .zst. The first row tells its kind:\n"
      "  pretrain    {\"text\": \"...\"}\n"
      "  chat        {\"conversations\": [{\"role\": \"user\", \"content\": \"...\"}, {\"role\": \"assistant\", "
      "...}]}\n"
      "  preference  {\"chosen\": [messages], \"rejected\": [messages]}\n"
      "  prompt      {\"conversations\": [messages], \"answer\": \"...\"}\n"
      "Roles are system, user, assistant and tool. A system message may carry \"tools\", an assistant's \"tool_calls\" "
      "and\n"
      "\"reasoning_content\". With --tokenizer rows are also turned into tokens, so that lengths and cut rows are "
      "known:\n"
      "choose --max-len (and --seq-len in training) so that few rows are cut and little is paid for the longest.\n"
      "Exit code 0: all rows good; 1: bad rows found; 2: a file could not be read.\n\n"
      "Examples:\n"
      "  minimind data check sft.jsonl\n"
      "  minimind data check --data pretrain.jsonl.gz sft.jsonl --tokenizer out/tokenizer --max-len 512\n"
      "  minimind data check sft.jsonl --json | jq '.files[0].first_bad_rows'");
  c->add_option("files,--data", flags->files, "Data sets")->required();
  c->add_option("--tokenizer", flags->tokenizer, "Folder with tokenizer.json: count tokens too");
  add_sample_flags(c, flags);
  add_common_flags(c, globals);
  c->callback([flags, &globals] { check(*flags, globals); });

  CLI::App* s = group->add_subcommand("show", "Print a row as training sees it, tokens coloured by loss mask");
  s->footer(
      "Training predicts every token from those before it, but the loss counts only targets: the whole of a text, in "
      "a\n"
      "conversation only what the assistant says (with the end mark, so that the model learns to stop).\n\n"
      "Examples:\n"
      "  minimind data show --data sft.jsonl --tokenizer out/tokenizer --row 12\n"
      "  minimind data show --data sft.jsonl --tokenizer out/tokenizer --color always | less -R\n"
      "  minimind data show --data sft.jsonl --tokenizer out/tokenizer --json | jq '.tokens, .is_target'");
  s->add_option("file,--data", flags->file, "Data set")->required();
  s->add_option("--tokenizer", flags->tokenizer, "Folder with tokenizer.json, or the file itself")->required();
  s->add_option("--row", flags->line, "Line number of the row, from 1")->check(at_least(1));
  s->add_option("--color", flags->color,
                "Colours: auto (on a terminal), always, never; without, targets stand in \xe2\x9f\xa6 \xe2\x9f\xa7")
      ->check(CLI::IsMember({"auto", "always", "never"}));
  add_sample_flags(s, flags);
  add_common_flags(s, globals);
  s->callback([flags, &globals] { show(*flags, globals); });
}

}  // namespace mm
