// The table of commands. Exit codes: 0 done, 1 a check that the command makes failed, 2 bad input, 130 interrupted.
#include <unistd.h>
#include <algorithm>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "base/interrupt.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/thread_team.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "cli/config_file.h"

namespace mm {

void add_common_flags(CLI::App* command, Globals& globals, std::vector<int>* thread_sweep) {
  command->add_flag("--json", globals.json, "Print results as JSON on standard output, and nothing else there");
  command->add_flag("--quiet", globals.quiet, "No progress bars");
  CLI::Option* threads =
      thread_sweep == nullptr
          ? command->add_option("--threads", globals.threads, "Threads to use (0: all cores)")
          : command->add_option("--threads", *thread_sweep, "Threads to use (0: all cores); a list is a sweep")
                ->delimiter(',');
  threads->check(in_range(0, 4096));
  command->add_option_function<std::string>(  // read by expand_config_file() before the parse
      "--config", [](const std::string&) {}, "TOML file of flags (those on the command line win)");
  command->parse_complete_callback([&globals] {
    set_num_threads(globals.threads);
    Progress::set_quiet(globals.quiet);
  });
}

void print_line(const std::string& line) {
  if (std::fwrite(line.data(), 1, line.size(), stdout) != line.size() || std::fputc('\n', stdout) == EOF ||
      std::fflush(stdout) != 0) {
    throw system_error("write failed", "standard output");
  }
}

void print_result(const Globals& globals, const ordered_json& result) {
  if (globals.json || !result.is_object()) {
    print_line(result.dump(-1, ' ', false, json::error_handler_t::replace));
    return;
  }
  size_t width = 0;
  for (const auto& [key, value] : result.items()) width = std::max(width, key.size());
  for (const auto& [key, value] : result.items()) {
    const std::string text =
        value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, json::error_handler_t::replace);
    print_line(fmt::format("{:<{}}  {}", key, width, text));
  }
}

// CLI11 takes the next argument for the value of `--name=`: `--api-key=$UNSET --quiet` would make "--quiet" the key.
static void require_values(const std::vector<std::string>& args) {
  for (const std::string& arg : args) {
    if (arg == "--") return;
    if (arg.size() < 4 || !arg.starts_with("--") || arg.back() != '=') continue;
    const std::string name = arg.substr(0, arg.size() - 1);
    const bool is_flag = std::all_of(name.begin(), name.end(),
                                     [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_'; });
    if (is_flag) throw Error(arg, "a value behind '='", "none", fmt::format("an empty one is written {} ''", name));
  }
}

// What is wrong, and whose --help says more: of the last command that was understood.
static std::string explain(const CLI::ParseError& e, const CLI::App& app) {
  const CLI::App* at = &app;
  std::string path = "minimind";
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands()[0];
    path += " " + at->get_name();
  }
  const std::vector<std::string> unknown = at->remaining();
  const bool no_command = at->get_require_subcommand_min() > 0 && !unknown.empty();
  return fmt::format("{} (see `{} --help`)",
                     no_command ? fmt::format("{}: expected a command, found \"{}\"", path, unknown[0]) : e.what(),
                     path);
}

static int run(int argc, char** argv) {
  CLI::App app{
      "minimind: the whole life of a small language model in one program\n"
      "Start with `minimind demo`, which trains a tokenizer and a model from nothing and chats with it.",
      "minimind"};
  app.set_version_flag("--version", MM_VERSION);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  Globals globals;
  add_demo_command(app, globals);
  add_tokenizer_commands(app, globals);
  add_data_commands(app, globals);
  add_train_commands(app, globals);
  add_eval_commands(app, globals);
  add_generate_command(app, globals);
  add_chat_command(app, globals);
  add_serve_command(app, globals);
  add_model_commands(app, globals);
  add_logits_command(app, globals);
  add_bench_command(app, globals);
  add_plot_command(app, globals);
  try {
    std::vector<std::string> args(argv + 1, argv + argc);
    require_values(args);
    args = expand_config_file(args);
    std::reverse(args.begin(), args.end());  // as CLI11 wants them
    app.parse(std::move(args));
    return 0;
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForAllHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForVersion& e) {
    return app.exit(e);
  } catch (const CLI::RuntimeError& e) {  // a command's own exit code
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    log_error("{}", explain(e, app));
    return 2;
  }
}

}  // namespace mm

// The OpenMP runtime of GCC lets idle threads spin for milliseconds, which starves the working ones as soon as anything
// else runs on the machine (measured: 18 times slower under load); 10,000 turns cost nothing on a quiet one. It reads
// the setting before main, hence the restart.
static void shorten_spins(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("GOMP_SPINCOUNT", "10000", 1);
  std::error_code ec;
  const std::string self =
      std::filesystem::read_symlink("/proc/self/exe", ec).string();  // by its name, which process lists then show
  execv(self.c_str(), argv);                                         // on failure go on as we are
}

int main(int argc, char** argv) {
  shorten_spins(argv);
  mm::start_interrupt_thread();
  // A closed pipe and a file past the size limit are failed writes with a message, not silent ends.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  try {
    return mm::run(argc, argv);
  } catch (const std::bad_alloc&) {
    mm::log_error("out of memory; use a smaller model, batch or sequence length");
  } catch (const std::exception& e) {
    mm::log_error("{}", e.what());
  }
  return 2;
}
