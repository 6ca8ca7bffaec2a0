// What every command shares: common flags, output form, and how a command joins the program.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "kernels/open_device.h"
#include "model/model.h"

namespace mm {

struct Globals {
  bool json = false;   // --json: one JSON object (or one a line) on standard output and nothing else there
  bool quiet = false;  // --quiet: no progress bars
  int threads = 0;     // --threads N, 0 = all cores
};

// Adds --json, --quiet, --threads and --config FILE.toml to a command that does work. With thread_sweep: --threads is a
// list, and the command sets each number itself.
void add_common_flags(CLI::App* command, Globals& globals, std::vector<int>* thread_sweep = nullptr);

// --device, --dtype and, where `naive`, the unfused GPU variants.
void add_device_flags(CLI::App* command, DeviceOptions& options, bool naive = false);

// --device, --weights, --kv and whatever else says how the engine runs; its flags go into EngineOptions but for the
// device and the folder of the draft model (see load_draft_model()).
struct EngineOptions;
void add_engine_flags(CLI::App* command, EngineOptions& options, DeviceOptions& device, std::string& draft_model);
// What a GPU computes with follows from the weights: f32 and f16 as they are, else bf16. Error for weights that the
// device does not take.
void set_compute_type(const EngineOptions& options, DeviceOptions& device);
// The model of --draft-model, or null where there is none; sets how many tokens it writes ahead.
std::unique_ptr<Model> load_draft_model(const std::string& folder, EngineOptions& options);

// Prints `result`: in --json mode as one line, else as aligned "key: value" lines. Flushes; Error if stdout is closed
// or full.
void print_result(const Globals& globals, const ordered_json& result);
void print_line(const std::string& line);  // one raw line on standard output, checked for write errors

// One function a cmd_*.cpp; listed in main.cpp.
void add_tokenizer_commands(CLI::App& app, Globals& globals);  // tokenizer train|encode|decode|stats|template
void add_data_commands(CLI::App& app, Globals& globals);       // data check|show
void add_model_commands(CLI::App& app, Globals& globals);      // model info
void add_logits_command(CLI::App& app, Globals& globals);
void add_train_commands(CLI::App& app, Globals& globals);  // pretrain, sft
void add_eval_commands(CLI::App& app, Globals& globals);   // eval ppl
void add_generate_command(CLI::App& app, Globals& globals);
void add_chat_command(CLI::App& app, Globals& globals);
void add_bench_command(CLI::App& app, Globals& globals);           // bench train|ops, and
void add_bench_infer_commands(CLI::App& group, Globals& globals);  // bench decode|prefill
void add_bench_serve_command(CLI::App& group, Globals& globals);   // bench serve
void add_bench_soak_command(CLI::App& group, Globals& globals);    // bench soak
void add_serve_command(CLI::App& app, Globals& globals);
void add_plot_command(CLI::App& app, Globals& globals);
void add_demo_command(CLI::App& app, Globals& globals);

}  // namespace mm
