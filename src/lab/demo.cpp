#include "lab/demo.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"
#include "base/progress.h"
#include "lab/line_plot.h"
#include "text/bpe_trainer.h"
#include "text/chat_template.h"

namespace mm {

namespace {

namespace fs = std::filesystem;

// The recipe. Found by trying about 90 variants (docs/LOG.md): what mattered most is the corpus (sums restate their
// operands, facts are asked already in pretraining), then small steps of 2,048 tokens and a large learning rate.
constexpr int64_t kPretrainRows = 60000, kSftRows = 33000;
constexpr int64_t kValidRows = 400, kAdditions = 300, kTwoSteps = 100, kFacts = 300;
constexpr int64_t kBatchSize = 4, kSeqLen = 512;  // packed: 2,048 tokens a step
constexpr double kPretrainLr = 3e-3, kSftLr = 2.5e-3;
constexpr int64_t kTokenizerRows = 20000;  // of each file; more do not change the merges

struct Paths {
  std::string dir, data, tokenizer, pretrain, sft, state, plot, report;
  explicit Paths(const std::string& d)
      : dir(d),
        data(path_join(d, "data")),
        tokenizer(path_join(d, "tokenizer")),
        pretrain(path_join(d, "pretrain")),
        sft(path_join(d, "sft")),
        state(path_join(d, "demo.json")),
        plot(path_join(d, "loss.svg")),
        report(path_join(d, "report.json")) {}
};

void check_options(const DemoOptions& o) {
  if (!(o.budget > 0 && o.budget <= 10))
    throw Error("--budget", "a number above 0, at most 10", fmt::format("{}", o.budget));
}

int64_t scaled(double budget, int64_t full, int64_t least) {
  return std::max(least, static_cast<int64_t>(std::llround(static_cast<double>(full) * budget)));
}

int64_t questions(const DemoOptions& o, int64_t full) { return scaled(std::min(o.budget, 1.0), full, 10); }

// True: an unfinished demo of the same options is there and goes on.
bool prepare_output(const DemoOptions& o, const Paths& paths) {
  const ordered_json now{{"seed", o.seed}, {"budget", o.budget}};
  bool resume = false;
  if (file_exists(paths.state)) {
    const ordered_json state = load_json(paths.state);
    const bool same = state.contains("options") && state["options"] == now;
    resume = same && !file_exists(paths.report) && !o.overwrite;
    if (!resume && !o.overwrite) {
      throw Error(o.output, "a new folder, or an interrupted demo of the same seed and budget",
                  same ? "a finished demo" : "a demo of other options",
                  fmt::format("talk to it with `minimind chat --model {}`, pass --overwrite to train it again, or "
                              "--output for another folder",
                              paths.sft));
    }
    if (!resume) {
      for (const std::string& path :
           {paths.report, paths.plot, paths.sft, paths.pretrain, paths.tokenizer, paths.data}) {
        std::error_code failed;
        fs::remove_all(path, failed);
        if (failed) throw Error(path, "a path that can be removed", failed.message());
      }
    }
  } else {
    require_new_dir(o.output, false);
  }
  make_dirs(paths.dir);
  write_file(paths.state, ordered_json{{"options", now}}.dump(2) + "\n");
  return resume;
}

// Pieces of a text between digits, line ends and added tokens. Training sees no digit and no line end beside anything
// else, so each stays a token of its own: sums can be learnt digit by digit, and an answer begins with the same tokens
// whether or not its text follows the prompt already.
void cut_pieces(std::string_view text, const std::vector<SpecialToken>& added, std::vector<std::string_view>& pieces) {
  size_t begin = 0, i = 0;
  const auto cut = [&](size_t length) {
    if (i > begin) pieces.push_back(text.substr(begin, i - begin));
    i += length;
    begin = i;
  };
  while (i < text.size()) {
    if ((text[i] >= '0' && text[i] <= '9') || text[i] == '\n') {
      cut(1);
    } else if (text[i] == '<') {
      const auto it = std::find_if(added.begin(), added.end(),
                                   [&](const SpecialToken& t) { return text.substr(i).starts_with(t.content); });
      if (it == added.end()) i++;
      else cut(it->content.size());
    } else {
      i++;
    }
  }
  cut(0);
}

std::vector<std::string> rendered_rows(const std::string& path, SampleKind kind, int64_t limit) {
  const std::string content = read_file(path);
  std::vector<std::string> texts;
  SampleParser parser;
  for (size_t i = 0; i < content.size() && static_cast<int64_t>(texts.size()) < limit;) {
    const size_t end = std::min(content.find('\n', i), content.size());
    Sample sample = parser.parse(std::string_view(content).substr(i, end - i), kind);
    texts.push_back(kind == SampleKind::pretrain ? std::move(sample.text)
                                                 : render_chat(sample.messages, sample.tools, {}));
    i = end + 1;
  }
  return texts;
}

Tokenizer train_tokenizer(const DemoCorpusFiles& files, int32_t vocab_size) {
  BpeTrainerOptions options;
  options.vocab_size = vocab_size;
  BpeTrainer trainer(options);
  for (const auto& [path, kind] : {std::pair{files.pretrain, SampleKind::pretrain}, {files.sft, SampleKind::chat}}) {
    const std::vector<std::string> texts = rendered_rows(path, kind, kTokenizerRows);
    std::vector<std::string_view> pieces;
    for (const std::string& text : texts) cut_pieces(text, options.special_tokens, pieces);
    trainer.feed(pieces);
  }
  return trainer.train();
}

TokenDataset tokenize(const std::string& path, SampleKind kind, const Tokenizer& tokenizer, uint64_t seed) {
  SampleOptions options;
  options.kind = kind;
  options.max_len = kSeqLen;
  options.empty_think_ratio = 1;  // as the prompt of a chat without thinking has it
  options.system_ratio = 0;       // the corpus has its own
  options.seed = seed;
  return TokenDataset::build({path}, tokenizer, options, "");
}

TrainOptions stage_options(const DemoOptions& o, const std::string& title, const std::string& output, double lr,
                           const TokenDataset& data, bool resume) {
  TrainOptions t;
  t.title = title;
  t.output = output;
  t.loader.batch_size = kBatchSize;
  t.loader.seq_len = kSeqLen;
  t.loader.seed = o.seed;
  t.schedule.base_lr = lr;
  t.schedule.warmup_steps = std::min<int64_t>(50, data.tokens() / (kBatchSize * kSeqLen) / 10);
  t.step.optimizer.beta2 = 0.95;
  t.step.optimizer.weight_decay = 0.1;
  t.seed = o.seed;
  t.save_every = 1000;
  t.keep_checkpoints = 1;
  t.resume = resume && dir_exists(path_join(output, "checkpoints"));
  t.device = o.device;
  return t;
}

// Loss by tokens seen, from the metrics of a stage.
PlotSeries loss_series(const std::string& name, const std::string& run, double tokens_before) {
  PlotSeries series{name, {}};
  const std::string path = path_join(run, "metrics.jsonl"), content = read_file(path);
  for (size_t i = 0; i < content.size();) {
    const size_t end = std::min(content.find('\n', i), content.size());
    const ordered_json row = parse_json(std::string_view(content).substr(i, end - i), path);
    const double loss = json_get_or(row, "train/loss", NAN, path), tokens = json_get_or(row, "train/tokens", NAN, path);
    if (std::isfinite(loss)) series.points.emplace_back(tokens_before + tokens / 1e6, loss);
    i = end + 1;
  }
  return series;
}

void draw_loss(const Paths& paths, const DemoSink& say) {
  LinePlot plot{"Loss while the demo learns", "million tokens", "cross-entropy (nats a token)", {}};
  plot.series.push_back(loss_series("pretraining", paths.pretrain, 0));
  plot.series.push_back(
      loss_series("fine-tuning", paths.sft, plot.series[0].points.empty() ? 0 : plot.series[0].points.back().first));
  write_file(paths.plot, render_svg(plot));
  for (const PlotSeries& s : plot.series) {
    std::vector<double> values;
    for (const auto& [tokens, loss] : s.points) values.push_back(loss);
    if (!values.empty())
      say(fmt::format("  {:<12} {:5.2f} {} {:.2f}", s.name, values.front(), sparkline(values, 40), values.back()));
  }
}

std::string score_line(const std::string& name, const DemoScore& s) {
  return fmt::format("  {:<46} {:5.1f} %  ({} of {})", name, 100 * s.share(), s.right, s.asked);
}

void evaluate(const DemoOptions& o, const DemoCorpusOptions& corpus, Model& model, const Tokenizer& tokenizer,
              const DemoSink& say, DemoReport& report) {
  GeneratorOptions options;
  options.max_sequences = 64;
  options.context = kSeqLen;
  options.prefill_chunk = 1024;
  options.device = o.device;
  Generator generator(model, tokenizer, options);
  report.additions = score_demo(generator, tokenizer, demo_addition_questions(corpus, questions(o, kAdditions)),
                                DemoMatch::last_number, false);
  say(score_line("two-digit additions never seen in training", report.additions));
  report.two_steps = score_demo(generator, tokenizer, demo_two_step_questions(corpus, questions(o, kTwoSteps)),
                                DemoMatch::last_number, true);
  say(score_line("a+b-c with such an a+b, thinking first", report.two_steps));
  report.facts =
      score_demo(generator, tokenizer, demo_fact_questions(corpus, questions(o, kFacts)), DemoMatch::contains, false);
  say(score_line("facts asked in words never used for them", report.facts));
}

void converse(const DemoOptions& o, const DemoCorpusOptions& corpus, Model& model, const Tokenizer& tokenizer,
              const DemoSink& say, DemoReport& report) {
  GeneratorOptions options;
  options.context = 1024;
  options.device = o.device;
  Generator generator(model, tokenizer, options);
  struct Line {
    std::string question;
    bool think = false;
  };
  const auto talk = [&](bool calculator, const std::vector<Line>& lines) {
    DemoConversation conversation(generator, tokenizer, calculator);
    for (const Line& line : lines) {
      say(fmt::format("  you       {}{}", line.question, line.think ? "   [/think]" : ""));
      ordered_json turn{{"user", line.question}, {"parts", ordered_json::array()}};
      for (const auto& [kind, part] : conversation.ask(line.question, line.think)) {
        say(fmt::format("  {:<9} {}", kind == "answer" ? "MiniMind" : kind == "result" ? "  tool" : "  " + kind, part));
        turn["parts"].push_back({{kind, part}});
      }
      report.conversation.push_back(turn);
    }
  };
  const std::string sum = demo_addition_questions(corpus, 2)[1].text,
                    steps = demo_two_step_questions(corpus, 1)[0].text;
  talk(false, {{"你好，你是谁？"}, {sum}, {steps, true}, {"What is the capital of France?"}});
  talk(true, {{"Please compute 347*86"}});
}

ordered_json stage_json(const TrainResult& r) {
  ordered_json j{{"steps", r.steps}};
  if (r.tokens > 0) {  // steps were made now, and not all by an earlier, interrupted run
    j["loss"] = r.loss;
    j["seconds"] = r.seconds;
    j["tokens"] = r.tokens;
    j["tokens_per_second"] = r.tokens_per_second;
    j["share_of_peak"] = r.share_of_peak;
  }
  if (r.valid_nll_before) j["valid_nll_before"] = *r.valid_nll_before;
  if (r.valid_nll) j["valid_nll"] = *r.valid_nll;
  return j;
}

ordered_json score_json(const DemoScore& s) {
  ordered_json j{{"accuracy", s.share()}, {"right", s.right}, {"asked", s.asked}, {"wrong", ordered_json::array()}};
  for (const auto& [question, reply] : s.wrong)
    j["wrong"].push_back({{"question", question.text}, {"expected", question.expected}, {"reply", reply}});
  return j;
}

}  // namespace

ordered_json DemoReport::to_json() const {
  return {{"interrupted", interrupted},
          {"model", model},
          {"loss_plot", loss_plot},
          {"parameters", parameters},
          {"vocab_size", vocab},
          {"seconds", seconds},
          {"pretrain", stage_json(pretrain)},
          {"sft", stage_json(sft)},
          {"held_out_additions", score_json(additions)},
          {"two_step_problems", score_json(two_steps)},
          {"facts_in_new_words", score_json(facts)},
          {"conversation", conversation}};
}

DemoReport run_demo(const DemoOptions& o, const DemoSink& say) {
  check_options(o);
  const Paths paths(o.output);
  const double start = now_seconds();
  const bool resume = prepare_output(o, paths);
  DemoReport report;
  report.model = paths.sft;

  if (resume) say(fmt::format("going on with the demo in {}", o.output));
  say("[1/6] writing a small bilingual world as training data");
  const DemoCorpusOptions corpus{.seed = o.seed,
                                 .pretrain_rows = scaled(o.budget, kPretrainRows, 100),
                                 .sft_rows = scaled(o.budget, kSftRows, 100),
                                 .valid_rows = questions(o, kValidRows)};
  const DemoCorpusFiles files = write_demo_corpus(paths.data, corpus);
  say(fmt::format("  {} texts, {} conversations in {}", corpus.pretrain_rows, corpus.sft_rows, paths.data));

  ModelConfig config = load_config("demo");
  say(fmt::format("[2/6] training a tokenizer with {} entries", config.vocab_size));
  const Tokenizer tokenizer = train_tokenizer(files, static_cast<int32_t>(config.vocab_size));
  tokenizer.save(paths.tokenizer);
  config.vocab_size = tokenizer.vocab_size();
  report.vocab = config.vocab_size;

  const std::unique_ptr<Model> model = Model::random(config, o.seed);
  report.parameters = model->table.numel();
  say(fmt::format("[3/6] pretraining a model of {} parameters from random numbers",
                  human_count(static_cast<double>(report.parameters))));
  const TokenDataset texts = tokenize(files.pretrain, SampleKind::pretrain, tokenizer, o.seed);
  report.pretrain = train_model(stage_options(o, "pretraining", paths.pretrain, kPretrainLr, texts, resume), *model,
                                tokenizer, texts, std::nullopt);
  report.interrupted = report.pretrain.interrupted;
  if (report.interrupted) return report;

  say("[4/6] fine-tuning it on conversations");
  const TokenDataset chats = tokenize(files.sft, SampleKind::chat, tokenizer, o.seed);
  report.sft = train_model(stage_options(o, "fine-tuning", paths.sft, kSftLr, chats, resume), *model, tokenizer, chats,
                           tokenize(files.sft_valid, SampleKind::chat, tokenizer, o.seed));
  report.interrupted = report.sft.interrupted;
  if (report.interrupted) return report;
  draw_loss(paths, say);
  report.loss_plot = paths.plot;

  say("[5/6] asking it what it has never seen");
  evaluate(o, corpus, *model, tokenizer, say, report);
  say("[6/6] talking with it");
  converse(o, corpus, *model, tokenizer, say, report);
  report.seconds = now_seconds() - start;
  report.report = paths.report;
  write_file(paths.report, report.to_json().dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  return report;
}

}  // namespace mm
