// minimind model info, minimind logits.
#include <fmt/ranges.h>

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/checks.h"
#include "cli/command.h"
#include "formats/safetensors.h"
#include "kernels/machine.h"
#include "model/cost.h"
#include "model/forward.h"
#include "model/lm_head.h"

namespace mm {

namespace {

// What will hurt later: quantized formats work on blocks of 256 weights, tensor cores and vectors on multiples of 64.
std::vector<std::string> shape_advice(const ModelConfig& c) {
  std::vector<std::string> out;
  const auto near = [](int64_t n, int64_t block) {
    return fmt::format("{} or {}", n / block * block, (n / block + 1) * block);
  };
  const int64_t f = c.ffn_width();
  if (f % 256 != 0) {
    out.push_back(
        fmt::format("FFN width {} is no multiple of 256: 256-wide quantization blocks (GGUF K-quants) cannot hold "
                    "down_proj; use {}",
                    f, near(f, 256)));
  }
  if (c.hidden_size % 256 != 0) {
    out.push_back(fmt::format("hidden_size {} is no multiple of 256: K-quants cannot hold the projections; use {}",
                              c.hidden_size, near(c.hidden_size, 256)));
  }
  if (c.head_dim % 32 != 0)
    out.push_back(
        fmt::format("head_dim {} is no multiple of 32: fast attention kernels want 32, 64, 96 or 128", c.head_dim));
  if (c.vocab_size % 64 != 0)
    out.push_back(fmt::format("vocab_size {} is no multiple of 64; {} would keep the head's rows aligned", c.vocab_size,
                              (c.vocab_size / 64 + 1) * 64));
  return out;
}

struct InfoFlags {
  std::string model, preset;
  int64_t batch_size = 32, seq_len = 340;
};

void model_info(const InfoFlags& f, const Globals& globals) {
  const std::string name = f.model.empty() ? f.preset : f.model;
  const ModelConfig c = load_config(name);
  const int64_t tokens = f.batch_size * f.seq_len;
  const MemoryPlan m = training_memory(c, tokens);
  const auto vocab = static_cast<double>(c.vocab_size);
  ordered_json out{{"name", name},
                   {"architecture", c.architecture},
                   {"parameters", param_count(c)},
                   {"active_parameters", active_param_count(c)},
                   {"expected_initial_loss", std::log(vocab)},
                   {"flops_per_token_forward", forward_flops_per_token(c, static_cast<double>(f.seq_len))},
                   {"flops_per_token_train", train_flops_per_token(c, static_cast<double>(f.seq_len))},
                   {"weights_bytes_fp32", m.weights},
                   {"weights_bytes_fp16", m.weights / 2},
                   {"kv_cache_bytes_per_token", KvCache::bytes(c, 1, 1)},
                   {"training_memory_bytes",
                    {{"batch_size", f.batch_size},
                     {"seq_len", f.seq_len},
                     {"weights", m.weights},
                     {"gradients", m.gradients},
                     {"optimizer", m.optimizer},
                     {"activations", m.activations},
                     {"lm_head", m.lm_head},
                     {"total", m.total()}}},
                   {"advice", shape_advice(c)},
                   {"config", c.to_json()}};
  if (globals.json) return print_result(globals, out);
  const auto b = [](size_t n) { return human_bytes(static_cast<double>(n)); };
  print_line(fmt::format(
      "{}: {}, {} parameters{}", name, c.architecture, human_count(static_cast<double>(param_count(c))),
      c.is_moe() ? fmt::format(" ({} active a token)", human_count(static_cast<double>(active_param_count(c)))) : ""));
  print_line(fmt::format(
      "  shape     {} layers, d_model {}, {} query and {} kv heads of {}, d_ff {}, vocabulary {}, context {}",
      c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.ffn_width(),
      c.vocab_size, c.max_position_embeddings));
  if (c.is_moe())
    print_line(fmt::format("  experts   {} of {} a token, {} shared", c.num_experts_per_tok, c.num_experts,
                           c.n_shared_experts));
  print_line(fmt::format("  weights   {} fp32, {} fp16", b(m.weights), b(m.weights / 2)));
  print_line(
      fmt::format("  training  batch {} x {}: weights {} + gradients {} + optimizer {} + activations {} + head {} = {}",
                  f.batch_size, f.seq_len, b(m.weights), b(m.gradients), b(m.optimizer), b(m.activations), b(m.lm_head),
                  b(m.total())));
  print_line(fmt::format("  work      {} operations a token forward, {} trained",
                         human_count(forward_flops_per_token(c, static_cast<double>(f.seq_len))),
                         human_count(train_flops_per_token(c, static_cast<double>(f.seq_len)))));
  print_line(fmt::format("  kv cache  {} a token", b(KvCache::bytes(c, 1, 1))));
  print_line(fmt::format("  loss      {:.4f} = ln {} expected before the first step", std::log(vocab), c.vocab_size));
  for (const std::string& s : shape_advice(c)) print_line("  advice    " + s);
}

void write_logits(const std::string& model_dir, const std::string& input, const std::string& output,
                  const DeviceOptions& device) {
  const OpenDevice open(device);
  const Device& dev = open.device;
  std::unique_ptr<Model> model = Model::load(model_dir);
  const SafetensorsFile file = SafetensorsFile::open(input);
  const TensorEntry& ids = file.at("input_ids");
  if (ids.dims.size() != 2 || (ids.dtype() != DType::i64 && ids.dtype() != DType::i32)) {
    throw Error(ids.where(), "[B, T] of i64 or i32", fmt::format("{} of {}", ids.shape().str(), ids.type_text));
  }
  const int64_t rows = ids.dims[0], len = ids.dims[1], v = model->config.vocab_size;
  if (rows == 0 || len == 0) throw Error(ids.where(), "at least one token", ids.shape().str());
  if (dev.on_gpu()) model = model->replica(dev, len);
  Activations acts(model->config, len, false, dev);
  LmHead head(model->config, dev);
  Buffer buffer(static_cast<size_t>(rows * len * v) * sizeof(float));
  std::vector<int32_t> all(static_cast<size_t>(len));
  for (int64_t t = 0; t < len; t++) all[static_cast<size_t>(t)] = static_cast<int32_t>(t);
  Progress bar("logits", rows, "rows");
  for (int64_t r = 0; r < rows; r++) {
    TokenBatch batch;
    batch.clear();
    for (int64_t t = 0; t < len; t++) {
      const char* at = static_cast<const char*>(ids.data) + static_cast<size_t>(r * len + t) * dtype_size(ids.dtype());
      int64_t id = 0;
      if (ids.dtype() == DType::i64) {
        std::memcpy(&id, at, sizeof id);
      } else {
        int32_t narrow = 0;
        std::memcpy(&narrow, at, sizeof narrow);
        id = narrow;
      }
      if (id < 0 || id >= v)
        throw Error(fmt::format("{} [{}, {}]", ids.where(), r, t), fmt::format("an id in [0, {})", v),
                    std::to_string(id));
      batch.ids.push_back(static_cast<int32_t>(id));
      batch.positions.push_back(static_cast<int32_t>(t));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(len));
    forward(dev, *model, batch, acts);
    head.logits(dev, *model, acts.h, all, View(buffer.f32() + r * len * v, DType::f32, {len, v}));
    bar.set(r + 1);
  }
  const TensorToWrite out{"logits", View(buffer.data(), DType::f32, {rows, len, v}), DType::f32};
  write_safetensors(output, {&out, 1});
}

}  // namespace

void add_model_commands(CLI::App& app, Globals& globals) {
  CLI::App* group = app.add_subcommand("model", "Look at models");
  group->require_subcommand(1);
  const auto f = std::make_shared<InfoFlags>();
  CLI::App* info = group->add_subcommand("info",
                                         "Parameters, memory plan, expected first loss and shape advice\n"
                                         "  minimind model info --preset minimind-3 --batch-size 32 --seq-len 340");
  auto* model = info->add_option("--model", f->model, "Model folder or config.json");
  auto* preset = info->add_option("--preset", f->preset, fmt::format("One of {}", fmt::join(preset_names(), ", ")));
  model->excludes(preset);
  info->add_option("--batch-size", f->batch_size, "Of the training memory plan")->check(in_range(1, 1 << 16));
  info->add_option("--seq-len", f->seq_len, "Of the training memory plan")->check(in_range(1, 1 << 20));
  add_common_flags(info, globals);
  info->callback([f, &globals] {
    if (f->model.empty() && f->preset.empty()) throw Error("model info", "--model DIR or --preset NAME", "neither");
    model_info(*f, globals);
  });
}

void add_logits_command(CLI::App& app, Globals& globals) {
  struct Flags {
    std::string model, ids, output;
    DeviceOptions device;
  };
  const auto f = std::make_shared<Flags>();
  CLI::App* c = app.add_subcommand("logits",
                                   "Logits of given ids, for comparing with other programs\n"
                                   "  minimind logits --model DIR --ids in.safetensors (input_ids [B, T]) --output "
                                   "out.safetensors (logits [B, T, V] fp32)");
  c->add_option("--model", f->model, "Model folder")->required();
  c->add_option("--ids", f->ids, "Safetensors file with the tensor input_ids")->required();
  c->add_option("--output", f->output, "Safetensors file to write")->required();
  add_device_flags(c, f->device);
  add_common_flags(c, globals);
  c->callback([f, &globals] {
    write_logits(f->model, f->ids, f->output, f->device);
    if (globals.json) print_result(globals, {{"output", f->output}});
  });
}

}  // namespace mm
