#include "base/error.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "engine/engine_options.h"
#include "tensor/memory.h"

namespace mm {

template <class T>
static void add_name(CLI::App* command, const char* flag, T& value, T (*from_name)(const std::string&, const char*),
                     const char* (*name)(T), const char* help) {
  command
      ->add_option_function<std::string>(
          flag, [&value, from_name, flag](const std::string& text) { value = from_name(text, flag); }, help)
      ->default_str(name(value))
      ->group("Engine");
}

void add_engine_flags(CLI::App* command, EngineOptions& o, DeviceOptions& device, std::string& draft_model) {
  const auto number = [&](const char* flag, int64_t& value, const char* help, int64_t low) {
    command->add_option(flag, value, help)->check(in_range(low, int64_t{1} << 40))->group("Engine");
  };
  command->add_option("--device", device.device, "auto (a GPU if one is usable), cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->group("Engine");
  add_name(command, "--weights", o.weights, weight_format_from_name, weight_format_name,
           "How weights are held: f32, bf16, i8 (groups of 32, made at load), or f16 (GPU)");
  add_name(command, "--kv-type", o.kv, kv_format_from_name, kv_format_name,
           "How keys and values are held: f32, bf16, f16 or i8");
  add_name(
      command, "--kv", o.kv_layout, kv_layout_from_name, kv_layout_name,
      "paged (blocks, shared prefixes), preallocated (a run a sequence) or concat (copied every step: the naive way)");
  number("--context", o.context, "Tokens of a sequence at most (0: the model's limit)", 0);
  number("--max-sequences", o.max_sequences, "Sequences at once", 1);
  number("--step-tokens", o.step_tokens,
         "Tokens of a step at most; longer prompts are cut (0: 512 on a CPU, 4096 on a GPU)", 0);
  number("--queue", o.queue_limit, "Waiting requests at most", 1);
  number("--block-size", o.block_size, "Tokens of a KV block, a power of two", 1);
  number("--kv-tokens", o.kv_tokens, "Tokens that the KV pool holds (0: by --kv-memory)", 0);
  command->add_option("--kv-memory", o.kv_memory_share, "Share of the free memory for the KV pool")
      ->check(in_range(0.01, 0.95))
      ->group("Engine");
  command->add_flag("--static-batch", o.static_batch, "A batch starts together, the next one when all have ended")
      ->group("Engine");
  command->add_flag("!--no-prefix-cache", o.prefix_cache, "Compute every prompt in full")->group("Engine");
  command->add_flag("--batch-invariant", o.batch_invariant, "The same bits alone and among others; slower")
      ->group("Engine");
  number("--ngram-draft", o.ngram_draft, "Speculative decoding: tokens proposed from what was said before (0: off)", 0);
  command
      ->add_option(
          "--draft-model", draft_model,
          "Speculative decoding: a smaller model of the same vocabulary that writes ahead (by the same draws); "
          "not with --ngram-draft")
      ->group("Engine");
  number("--draft-tokens", o.draft_tokens, "Tokens that --draft-model writes ahead (0: 4)", 0);
}

void set_compute_type(const EngineOptions& o, DeviceOptions& device) {
  const bool native = o.weights == WeightFormat::f32 || o.weights == WeightFormat::f16;
  device.dtype = native ? weight_format_name(o.weights) : "auto";
  const bool on_cpu = device.device == "cpu" || (device.device == "auto" && !cuda_status().usable);
  if (on_cpu && o.weights == WeightFormat::f16) throw Error("--weights", "f32, bf16 or i8 on the CPU", "f16");
}

std::unique_ptr<Model> load_draft_model(const std::string& folder, EngineOptions& o) {
  if (folder.empty()) return nullptr;
  if (o.ngram_draft > 0)
    throw Error("--draft-model", "no --ngram-draft beside it", fmt::format("--ngram-draft {}", o.ngram_draft),
                "only one of them can write ahead: leave the other out");
  if (o.draft_tokens == 0) o.draft_tokens = 4;
  return Model::load(folder);
}

}  // namespace mm
