// `minimind serve`: the OpenAI API and a chat page over one model.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "base/fs.h"
#include "base/interrupt.h"
#include "base/log.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "cli/sampling_flags.h"
#include "engine/engine.h"
#include "serve/server.h"

namespace mm {

struct ServeFlags {
  std::string model, draft_model, api_key_file;
  bool no_empty_think = false;
  double drain_seconds = 30;
  int64_t max_body_mb = 4, max_pending_kb = 1024;
  ServerOptions server;
  EngineOptions engine;
  DeviceOptions device;
};

static std::string first_line(const std::string& text) { return text.substr(0, text.find_first_of("\r\n")); }

static void read_key(ServeFlags& f) {
  if (!f.api_key_file.empty()) {
    f.server.api_key = first_line(read_file(f.api_key_file, 1 << 16));
    if (f.server.api_key.empty()) throw Error(f.api_key_file, "a key in the first line", "none");
  } else if (const char* key = std::getenv("MINIMIND_API_KEY"); f.server.api_key.empty() && key != nullptr) {
    f.server.api_key = key;
  }
}

static std::string folder_name(const std::string& path) {
  const auto folder = std::filesystem::weakly_canonical(path);
  return folder.filename().empty() ? "minimind" : folder.filename().string();
}

static void serve(ServeFlags& f, const Globals& globals) {
  read_key(f);
  check_sampling(f.server.sampling);
  f.server.max_body = f.max_body_mb << 20;
  f.server.max_pending = f.max_pending_kb << 10;
  f.server.keep_empty_think = !f.no_empty_think;
  f.server.version = MM_VERSION;
  if (f.server.names.empty()) f.server.names.push_back(folder_name(f.model));
  if (f.server.names[0] == "*") f.server.names.insert(f.server.names.begin(), folder_name(f.model));

  set_compute_type(f.engine, f.device);
  const OpenDevice open(f.device);
  f.engine.device = open.device;
  auto draft = load_draft_model(f.draft_model, f.engine);
  auto model = Model::load(f.model);
  const Tokenizer tokenizer = Tokenizer::load(f.model);
  for (const int64_t id : {static_cast<int64_t>(tokenizer.eos_id()), static_cast<int64_t>(model->config.eos_token_id)})
    if (id >= 0) f.server.stop_ids.push_back(static_cast<int32_t>(id));
  f.engine.warm_up = true;
  Engine engine(*model, tokenizer, f.engine, draft.get());
  model.reset();  // the engine has its own weights
  draft.reset();
  const InterruptGuard guard;  // the first signal drains, the second one ends at once
  Server server(engine, tokenizer, f.server);
  if (globals.json) {
    print_line(ordered_json{{"url", server.url()},
                            {"model", f.server.names[0]},
                            {"context", engine.context()},
                            {"engine", engine.description()}}
                   .dump());
  } else {
    print_line("listening on " + server.url());
    log_info("{}: {}, {} tokens of context", f.server.names[0], engine.description(), engine.context());
  }
  while (!InterruptGuard::requested()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  log_info("ending: running requests have {} s; a second signal ends at once", f.drain_seconds);
  server.drain(f.drain_seconds);
}

void add_serve_command(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ServeFlags>();
  ServeFlags& f = *flags;
  ServerOptions& s = f.server;
  CLI::App* command = app.add_subcommand("serve", "Answer over HTTP: the OpenAI API and a chat page");
  command->add_option("model,--model", f.model, "Model folder")->required();
  const auto network = [&](CLI::Option* option) { return option->group("Network"); };
  network(command->add_option("--host", s.host, "Address to listen on"));
  network(command->add_option("--port", s.port, "Port (0: a free one)"))->check(in_range(0, 65535));
  network(command->add_option("--served-name", s.names,
                              "Name of the model (default: the folder's); may be given several times, '*' takes any"))
      ->allow_extra_args(false);
  network(command->add_option("--tls-cert", s.tls_cert, "Certificate chain (PEM): HTTPS"))->check(not_empty("a file"));
  network(command->add_option("--tls-key", s.tls_key, "Its private key (PEM)"))->check(not_empty("a file"));
  network(command->add_option("--http-threads", s.threads, "Threads for connections (0: by the machine)"))
      ->check(in_range(0, 256));

  const auto access = [&](CLI::Option* option) { return option->group("Access"); };
  access(command->add_option("--api-key", s.api_key,
                             "Key that clients must send (others on this machine can read it here: better by "
                             "--api-key-file or the variable MINIMIND_API_KEY)"))
      ->check(secret());
  access(command->add_option("--api-key-file", f.api_key_file, "File with the key in its first line"))
      ->check(not_empty("a file"));
  access(command->add_flag("--insecure", s.insecure, "Listen beyond this machine without a key"));
  access(command->add_option("--cors", s.cors_origins,
                             "Origin whose pages may ask: https://example.com, or '*' for any; several times"))
      ->allow_extra_args(false)
      ->check(origin());
  access(command->add_option("--allow-host", s.allowed_hosts,
                             "Further name in the Host header while listening on this machine alone; several times"))
      ->allow_extra_args(false)
      ->check(not_empty("a name"));

  const auto limit = [&](CLI::Option* option) { return option->group("Limits"); };
  const auto seconds = in_range(0.0, 1e6);
  limit(command->add_option("--max-body", f.max_body_mb, "MB of a request's body"))->check(in_range(1, 1024));
  limit(command->add_option("--max-connections", s.max_connections, "Connections at once"))
      ->check(in_range(1, 1 << 20));
  limit(command->add_option("--max-pending", f.max_pending_kb, "KB of a stream that its client has not read"))
      ->check(in_range(1, 1 << 20));
  limit(
      command->add_option("--read-seconds", s.read_seconds, "For a request's header; its body has four times as long"))
      ->check(seconds);
  limit(command->add_option("--write-seconds", s.write_seconds, "A client that reads nothing for so long is dropped"))
      ->check(seconds);
  limit(command->add_option("--idle-seconds", s.idle_seconds, "Between requests of a connection"))->check(seconds);
  limit(command->add_option("--comment-seconds", s.comment_seconds, "A silent stream sends a comment so often"))
      ->check(seconds);
  limit(command->add_option("--request-seconds", s.request_seconds, "Time for a request, queue included (0: no limit)"))
      ->check(seconds);
  limit(command->add_option("--drain-seconds", f.drain_seconds, "For running requests after SIGTERM or Ctrl-C"))
      ->check(seconds);

  add_engine_flags(command, f.engine, f.device, f.draft_model);
  command->add_flag("--no-empty-think", f.no_empty_think,
                    "No empty <think></think> before answers, for models trained without it");
  add_sampling_flags(command, s.sampling);
  command->remove_option(command->get_option("--seed"));  // every request has its own
  add_common_flags(command, globals);
  command->callback([flags, &globals] { serve(*flags, globals); });
}

}  // namespace mm
