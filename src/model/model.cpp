#include "model/model.h"

#include <set>

#include "base/error.h"
#include "base/fs.h"
#include "base/rng.h"
#include "base/thread_team.h"
#include "formats/safetensors.h"
#include "kernels/ops.h"

namespace mm {

std::unique_ptr<Model> Model::random(const ModelConfig& config, uint64_t seed) {
  auto model = std::make_unique<Model>(config);
  uint64_t stream = 0;
  for (const ParamSpec& spec : model->table.specs()) {
    float* p = model->weights.view(spec).f32();
    const uint64_t s = stream++;
    parallel_for(spec.shape.numel(), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        p[i] = spec.init == Init::ones ? 1.0f : 0.02f * philox_normal(seed, s, static_cast<uint64_t>(i));
    });
  }
  return model;
}

// transformers 5 may keep all experts of a layer in one tensor: experts.gate_up_proj [E, 2f, d] and experts.down_proj
// [E, d, f].
static bool read_stacked_expert(const SafetensorsFolder& files, const ParamSpec& spec, int64_t n_expert,
                                const View& dst, std::set<std::string>& used) {
  const size_t at = spec.hf_name.find(".mlp.experts.");
  if (at == std::string::npos) return false;
  const std::string prefix = spec.hf_name.substr(0, at + 12);
  const std::string rest = spec.hf_name.substr(at + 13);  // "3.gate_proj.weight"
  const int64_t expert = std::stoll(rest);
  const bool is_down = rest.find("down_proj") != std::string::npos, is_up = rest.find("up_proj") != std::string::npos;
  const std::string name = prefix + (is_down ? ".down_proj" : ".gate_up_proj");
  const TensorEntry* t = files.find(name);
  if (t == nullptr) return false;
  const int64_t rows = spec.shape[0], cols = spec.shape[1], stacked = is_down ? rows : 2 * rows;
  const Shape have = t->shape();
  const Shape wanted{n_expert, stacked, cols};
  if (have != wanted) {
    throw Error(t->where(), "shape " + wanted.str(), have.str(), "does the config belong to these weights?");
  }
  const View all = t->view();
  View part = View(all.data, all.dtype, {have[0] * stacked, cols})
                  .row_slice(expert * stacked + (is_up ? rows : 0), expert * stacked + (is_up ? rows : 0) + rows);
  TensorEntry slice = *t;
  slice.data = part.data;
  slice.bytes = part.bytes();
  slice.dims = {rows, cols};
  slice.read_floats(dst);
  used.insert(name);
  return true;
}

std::unique_ptr<Model> Model::load(const std::string& dir) {
  if (!dir_exists(dir))
    throw Error(dir, "a model folder (config.json and model.safetensors)",
                file_exists(dir) ? "a file" : "nothing there");
  const std::string config_path = path_join(dir, "config.json");
  ModelConfig config = ModelConfig::from_json(load_json(config_path), config_path);
  // MiniMind's own config does not say whether its generation has qk-norm; the file does.
  if (config.architecture == "MiniMindForCausalLM") {
    config.qk_norm = SafetensorsFolder::open(dir).find("model.layers.0.self_attn.q_norm.weight") != nullptr;
    // Same computation under the name that other tools know, where there is one.
    if (!config.is_moe()) config.architecture = config.qk_norm ? "Qwen3ForCausalLM" : "LlamaForCausalLM";
    else if (config.qk_norm && config.n_shared_experts == 0) config.architecture = "Qwen3MoeForCausalLM";
  }
  auto model = std::make_unique<Model>(config);
  model->read_weights(dir);
  return model;
}

void Model::read_weights(const std::string& dir) {
  const SafetensorsFolder files = SafetensorsFolder::open(dir);
  std::set<std::string> used;
  std::vector<std::pair<const TensorEntry*, View>> whole;
  for (const ParamSpec& spec : table.specs()) {
    const View dst = weights.view(spec);
    if (files.find(spec.hf_name) == nullptr && read_stacked_expert(files, spec, config.num_experts, dst, used))
      continue;
    whole.emplace_back(&files.at(spec.hf_name, spec.shape), dst);
    used.insert(spec.hf_name);
  }
  // Most of the time goes into first touches of the new memory's pages and of the file's: all threads share them.
  parallel_dynamic(static_cast<int64_t>(whole.size()), [&](int64_t i, int) {
    const auto& [entry, dst] = whole[static_cast<size_t>(i)];
    entry->read_floats(dst);
  });
  for (const std::string& name : files.names()) {
    const bool known_extra = name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq") ||
                             name.ends_with("freqs_cos") || name.ends_with("freqs_sin");
    if (used.count(name) == 0 && !known_extra) {
      throw Error(fmt::format("{}: tensor \"{}\"", dir, name), "only tensors that config.json calls for", "this one",
                  "check that config.json belongs to these weights");
    }
  }
}

std::unique_ptr<Model> Model::replica(const Device& dev, int64_t max_len) const {
  auto copy = std::make_unique<Model>(config, dev.act, dev.memory());
  const View from = weights.flat(), to = copy->weights.flat();
  if (!dev.on_gpu()) {
    MM_CHECK(dev.act == DType::f32);
    ops::copy(dev, to, from);
  } else {
    const Buffer staged(from.bytes(), Memory::cuda);
    copy_async(staged.data(), from.data, from.bytes(), dev.stream);
    ops::cast(dev, to, View(staged.data(), DType::f32, from.shape));
    synchronize(dev.stream);
  }
  copy->rope.place(dev, max_len);
  return copy;
}

void Model::save(const std::string& dir, DType dtype) const {
  make_dirs(dir);
  std::vector<TensorToWrite> tensors;
  for (const ParamSpec& spec : table.specs()) tensors.push_back({spec.hf_name, weights.view(spec), dtype});
  write_safetensors(path_join(dir, "model.safetensors"), tensors);
  ordered_json j = config.to_json();
  j["torch_dtype"] = dtype == DType::f16 ? "float16" : dtype == DType::bf16 ? "bfloat16" : "float32";
  write_file(path_join(dir, "config.json"), j.dump(2) + "\n");
  const ordered_json generation{{"bos_token_id", config.bos_token_id},
                                {"eos_token_id", config.eos_token_id},
                                {"pad_token_id", config.pad_token_id}};
  write_file(path_join(dir, "generation_config.json"), generation.dump(2) + "\n");
}

}  // namespace mm
