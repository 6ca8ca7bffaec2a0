// `minimind chat`: a conversation in the terminal, or over pipes.
#include <unistd.h>

#include <cstdio>

#include "base/error.h"
#include "base/fs.h"
#include "base/interrupt.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "cli/line_input.h"
#include "cli/sampling_flags.h"
#include "engine/chat_session.h"
#include "engine/generate.h"
#include "engine/think_splitter.h"

namespace mm {

struct ChatFlags {
  std::string model, system;
  bool think = false, no_empty_think = false;
  int64_t max_new_tokens = 1024, context = 0;
  SamplingParams sampling;
  DeviceOptions device;
};

static constexpr const char* kHelp =
    "/think        switch thinking before the answer on or off\n"
    "/system TEXT  set the system message (without TEXT: remove it)\n"
    "/history      show the conversation\n"
    "/reset        forget the conversation\n"
    "/save FILE    append the conversation to FILE as one line of training data (jsonl)\n"
    "/help         this text\n"
    "/exit         leave (also Ctrl-D); Ctrl-C stops an answer";

static void print_text(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw system_error("write failed", "standard output");
  }
}

class Chat {
 public:
  Chat(const Globals& globals, const ChatFlags& flags, Generator& generator, const Tokenizer& tokenizer)
      : globals_(globals),
        flags_(flags),
        generator_(generator),
        tokenizer_(tokenizer),
        session_(tokenizer, !flags.no_empty_think),
        colors_(isatty(STDOUT_FILENO) != 0 && !globals.json) {
    session_.set_system(flags.system);
    session_.set_open_thinking(flags.think);
  }

  // Until the input ends. False when a line of a script (no terminal) failed.
  bool run() {
    LineInput input("chat_history");
    if (input.interactive()) say("Type a message, /help for commands, Ctrl-D to leave.");
    std::string line;
    bool ok = true;
    while (input.read("> ", line)) {
      if (line.find_first_not_of(" \t\r\n") == std::string::npos) continue;
      try {
        if (!line.starts_with('/')) answer(line);
        else if (!command(line)) break;
      } catch (const Error& e) {  // a message too long, a file that cannot be written: the chat goes on
        log_error("{}", e.what());
        ok = input.interactive();
      }
    }
    if (input.interactive()) std::fputc('\n', stderr);
    return ok;
  }

 private:
  // What is not part of an answer goes to standard error.
  static void say(const std::string& text) { std::fprintf(stderr, "%s\n", text.c_str()); }

  bool command(const std::string& line) {  // false: leave
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const std::string rest = space == std::string::npos ? "" : line.substr(line.find_first_not_of(' ', space));
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help") {
      say(kHelp);
    } else if (name == "/think") {
      session_.set_open_thinking(!session_.open_thinking());
      say(session_.open_thinking() ? "thinking is on" : "thinking is off");
    } else if (name == "/reset") {
      session_.reset();
      say("the conversation is forgotten");
    } else if (name == "/system") {
      session_.set_system(rest);
      say(rest.empty() ? "no system message" : "system message set");
    } else if (name == "/history") {
      for (const auto& m : session_.messages()) {
        if (m.contains("reasoning_content"))
          say(fmt::format("(thought: {})", m["reasoning_content"].get<std::string>()));
        say(fmt::format("{}: {}", m["role"].get<std::string>(), m["content"].get<std::string>()));
      }
    } else if (name == "/save") {
      save(rest);
    } else {
      throw Error("chat", "a command of /help, or a message that does not begin with /", fmt::format("\"{}\"", name));
    }
    return true;
  }

  void save(const std::string& path) {
    if (path.empty()) throw Error("/save", "a file name", "none");
    if (session_.messages().empty()) throw Error("/save", "a conversation", "no message yet");
    AppendFile(path).write(
        ordered_json{{"conversations", session_.messages()}}.dump(-1, ' ', false, json::error_handler_t::replace) +
        "\n");
    say(fmt::format("appended to {}", path));
  }

  void answer(const std::string& text) {
    session_.add_user(text);
    GenerateRequest request;
    // Half of the context at most for the answer: a long --max-new-tokens must not push the whole conversation out.
    request.max_new_tokens = std::min(flags_.max_new_tokens, generator_.context() / 2);
    int dropped = 0;
    request.prompt = session_.prompt(generator_.context() - request.max_new_tokens, &dropped);
    if (dropped > 0) say(fmt::format("(the context is full: the oldest {} turn(s) are forgotten)", dropped));
    request.sampling = flags_.sampling;
    request.sampling.seed += turn_++;
    request.stop_ids = {tokenizer_.eos_id()};

    ThinkSplitter splitter(session_.open_thinking());
    const auto show = [&](const std::vector<ThinkSplitter::Part>& parts) {
      for (const auto& part : parts) print_part(part);
    };
    thinking_shown_ = false;
    GenerateResult result;
    const InterruptGuard guard;
    try {
      result = generator_.run({&request, 1}, [&](size_t, int32_t, std::string_view delta) {
        if (!globals_.json) show(splitter.push(delta));
        return !InterruptGuard::requested();
      })[0];
    } catch (...) {
      session_.take_back_user();
      if (colors_) print_text("\033[0m");
      throw;
    }
    session_.add_answer(result.text);
    const double speed =
        result.decode_seconds > 0 ? static_cast<double>(result.ids.size() - 1) / result.decode_seconds : 0;
    if (globals_.json) {
      ordered_json line = session_.messages().back();
      line["finish_reason"] = finish_reason_name(result.finish);
      line["prompt_tokens"] = request.prompt.size();
      line["completion_tokens"] = result.ids.size();
      line["tokens_per_second"] = speed;
      print_line(line.dump(-1, ' ', false, json::error_handler_t::replace));
      return;
    }
    show(splitter.flush());
    print_text(colors_ ? "\033[0m\n" : "\n");
    if (colors_ && !globals_.quiet) {
      say(fmt::format(
          "\033[2m[{} tokens, {:.1f} tok/s, first after {:.0f} ms{}]\033[0m", result.ids.size(), speed,
          result.prefill_seconds * 1e3,
          result.finish == FinishReason::stop ? "" : fmt::format(", {}", finish_reason_name(result.finish))));
    }
  }

  void print_part(const ThinkSplitter::Part& part) {
    if (part.thinking != thinking_shown_) {
      if (part.thinking) print_text(colors_ ? "\033[2m" : "<think>\n");
      else print_text(colors_ ? "\033[0m\n\n" : "\n</think>\n\n");
      thinking_shown_ = part.thinking;
    }
    print_text(part.text);
  }

  const Globals& globals_;
  const ChatFlags& flags_;
  Generator& generator_;
  Tokenizer tokenizer_;
  ChatSession session_;
  bool colors_, thinking_shown_ = false;
  uint64_t turn_ = 0;
};

void add_chat_command(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ChatFlags>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  command->add_option("--model", flags->model, "Model folder")->required();
  command->add_option("--system", flags->system, "System message");
  command->add_flag("--think", flags->think, "Think before answering (switch with /think)");
  command->add_flag("--no-empty-think", flags->no_empty_think,
                    "No empty <think></think> before answers, for models trained without it");
  command->add_option("--max-new-tokens", flags->max_new_tokens, "Tokens of one answer at most")
      ->check(in_range(int64_t{1}, int64_t{1} << 30));
  command
      ->add_option("--context", flags->context,
                   "Tokens of the conversation at most (0: the model's limit, at most 8192)")
      ->check(at_least(0));
  add_sampling_flags(command, flags->sampling);
  add_device_flags(command, flags->device);
  add_common_flags(command, globals);
  command->callback([flags, &globals] {
    check_sampling(flags->sampling);
    const OpenDevice open(flags->device);
    const auto model = Model::load(flags->model);
    const Tokenizer tokenizer = Tokenizer::load(flags->model);
    const int64_t limit = model->config.max_position_embeddings;
    Generator generator(*model, tokenizer,
                        {.context = flags->context > 0 ? flags->context : std::min<int64_t>(limit, 8192),
                         .reuse_prefix = true,
                         .device = open.device});
    Chat chat(globals, *flags, generator, tokenizer);
    if (!chat.run()) throw CLI::RuntimeError(2);
  });
}

}  // namespace mm
