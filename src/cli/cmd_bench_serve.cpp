// minimind bench serve: load on a server that speaks OpenAI's API.
#include "base/error.h"
#include "base/fs.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "lab/bench_serve.h"

namespace mm {

namespace {

struct ServeFlags {
  std::string url = "http://127.0.0.1:8000", endpoint = "chat", prompts, prompt_tokens = "128", output_tokens = "128",
              slo, extra, out;
  bool no_stream = false, no_keep_alive = false, overwrite = false;
  std::string ignore_eos = "auto";
  ServeBenchOptions bench;
};

std::string command_line(const ServeFlags& f) {
  std::string s = fmt::format("minimind bench serve --url {} --endpoint {}", f.url, f.endpoint);
  if (f.prompts.empty()) s += fmt::format(" --prompt-tokens {}", f.prompt_tokens);
  else s += fmt::format(" --prompts {}", f.prompts);
  s += fmt::format(" --output-tokens {} --seed {}", f.output_tokens, f.bench.plan.seed);
  for (const int64_t c : f.bench.clients) s += fmt::format("{}{}", c == f.bench.clients[0] ? " --clients " : ",", c);
  for (const double r : f.bench.rates) s += fmt::format("{}{:g}", r == f.bench.rates[0] ? " --rate " : ",", r);
  s += f.bench.n_request > 0 ? fmt::format(" --requests {}", f.bench.n_request)
                             : fmt::format(" --seconds {:g}", f.bench.seconds);
  if (!f.slo.empty()) s += " --slo " + f.slo;
  return s;
}

void run_serve(ServeFlags& f, const Globals& globals) {
  ServeBenchOptions& b = f.bench;
  if (!f.out.empty()) require_new_dir(f.out, f.overwrite);
  const std::string key = b.target.api_key;
  b.target = load_target_from_url(f.url, "--url");
  b.target.api_key = key;
  b.plan.chat = f.endpoint == "chat";
  b.plan.stream = !f.no_stream;
  b.plan.prompt_tokens = length_distribution_from_text(f.prompt_tokens, "--prompt-tokens");
  b.plan.output_tokens = length_distribution_from_text(f.output_tokens, "--output-tokens");
  if (!f.prompts.empty()) b.plan.prompts = load_prompts(f.prompts);
  // Made-up prompts have no natural end: every answer takes its drawn length, so that runs compare.
  b.plan.ignore_eos = f.ignore_eos == "on" || (f.ignore_eos == "auto" && f.prompts.empty());
  if (!f.extra.empty()) {
    b.plan.extra = parse_json(f.extra, "--extra");
    if (!b.plan.extra.is_object()) throw Error("--extra", "a JSON object", json_type_name(b.plan.extra));
  }
  b.keep_alive = !f.no_keep_alive;
  b.slo = slo_from_text(f.slo);
  if (b.clients.empty() && b.rates.empty()) b.clients = {1, 2, 4, 8, 16, 32};
  if (!globals.json) print_line(serve_table_head());
  bool any_ok = false;
  const ordered_json result = bench_serve(b, [&](const ordered_json& level) {
    if (!globals.json) print_line(serve_table_row(level));
    any_ok = any_ok || level["ok"].get<int64_t>() > 0;
  });
  if (!f.out.empty()) write_serve_report(f.out, result, command_line(f));
  if (globals.json) print_result(globals, result);
  if (!any_ok) throw CLI::RuntimeError(1);
}

}  // namespace

void add_bench_serve_command(CLI::App& group, Globals& globals) {
  const auto f = std::make_shared<ServeFlags>();
  ServeBenchOptions& b = f->bench;
  CLI::App* c = group.add_subcommand(
      "serve",
      "Load on any server with OpenAI's API: latency percentiles, throughput, goodput, errors\n"
      "  minimind bench serve --url http://127.0.0.1:8000 --clients 1,8,32 --seconds 10 --out report\n"
      "  minimind bench serve --rate 5,10,20 --prompts sft.jsonl --slo ttft:300,tpot:30");
  c->add_option("--url", f->url, "The server (plain HTTP; a path before /v1 is kept)");
  c->add_option("--model", b.plan.model, "Its name for the model (default: the first of /v1/models)");
  c->add_option("--api-key", b.target.api_key, "Sent as bearer token")->envname("OPENAI_API_KEY");
  c->add_option("--endpoint", f->endpoint, "chat or completions")->check(CLI::IsMember({"chat", "completions"}));
  c->add_option("--clients,--concurrency", b.clients,
                "Closed loop: clients that send again when answered; a list is a sweep (default 1,2,4,8,16,32)")
      ->delimiter(',')
      ->check(in_range(1, 65536));
  c->add_option("--rate", b.rates, "Open loop: Poisson arrivals, requests a second; a list is a sweep")
      ->delimiter(',')
      ->check(above_zero());
  c->add_option("--seconds", b.seconds, "Length of a level")->check(above_zero());
  c->add_option("--requests", b.n_request, "Requests of a level, in place of --seconds")->check(above_zero());
  c->add_option("--warmup", b.warmup,
                "Requests of a level before those measured (default: as many as clients, or a second's)")
      ->check(at_least(0));
  c->add_option(
      "--prompt-tokens", f->prompt_tokens,
      "Made-up prompts: N, uniform:FIRST:LAST, normal:MEAN:DEVIATION or lognormal:MEDIAN:SIGMA, in short English "
      "words of about a token each");
  c->add_option("--shared-tokens", b.plan.shared_tokens, "Words at the start that all made-up prompts share")
      ->check(at_least(0));
  c->add_option("--prompts", f->prompts,
                "Real prompts: jsonl rows {\"conversations\"} (MiniMind's SFT data), {\"messages\"} or {\"prompt\"}");
  c->add_option("--output-tokens", f->output_tokens, "max_tokens of an answer: as --prompt-tokens");
  c->add_option(
       "--ignore-eos", f->ignore_eos,
       "Ask for answers of full length (ignore_eos, known to minimind, vLLM and llama.cpp): on, off, or auto (on "
       "for made-up prompts)")
      ->check(CLI::IsMember({"auto", "on", "off"}));
  c->add_flag("--no-stream", f->no_stream, "Whole answers in place of streams (no TTFT, no TPOT)");
  c->add_flag("--no-keep-alive", f->no_keep_alive, "A new connection for each request");
  c->add_option("--temperature", b.plan.temperature, "Of every request")->check(at_least(0));
  c->add_option("--seed", b.plan.seed, "Of lengths, words, arrivals and the requests' own seeds");
  c->add_option("--extra", f->extra, "Further fields of every request, a JSON object: '{\"top_p\": 0.9}'");
  c->add_option("--slo", f->slo, "Goodput counts requests within ttft:MS,tpot:MS,e2e:MS (any of them)");
  c->add_option("--timeout", b.timeout, "Seconds a request may take")->check(above_zero());
  c->add_option("--workers", b.workers, "Threads of this client (0: one for each eight cores)")->check(in_range(0, 64));
  c->add_option("--out", f->out, "New folder for results.json, report.md and plots");
  c->add_flag("--overwrite", f->overwrite, "Write into a folder that exists");
  add_common_flags(c, globals);
  c->callback([f, &globals] { run_serve(*f, globals); });
}

}  // namespace mm
