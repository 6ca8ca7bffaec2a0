#include "engine/runner.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <fstream>

#include "base/error.h"
#include "engine/cpu_runner.h"
#include "engine/cuda_runner.h"
#include "engine/kv_views.h"

namespace mm {

size_t kv_bytes_per_token(const ModelConfig& c, KvFormat format) {
  const auto heads = static_cast<size_t>(2 * c.num_hidden_layers * c.num_key_value_heads);
  return heads *
         (static_cast<size_t>(c.head_dim) * kv_element_bytes(format) + (format == KvFormat::i8 ? sizeof(float) : 0));
}

int64_t staggered_rows(const ModelConfig& c, KvFormat format, int64_t n_row) {
  constexpr int64_t unit = 16;  // keeps pieces aligned
  constexpr auto page = static_cast<int64_t>(large_page);
  const int64_t unit_bytes = unit * c.head_dim * static_cast<int64_t>(kv_element_bytes(format));
  const int64_t units = (n_row + unit - 1) / unit;
  if (units * unit_bytes < page) return n_row;
  const int64_t apart = page / (c.num_hidden_layers * c.num_key_value_heads);
  const int64_t missing = ((apart - units * unit_bytes) % page + page) % page;
  return (units + (missing + unit_bytes - 1) / unit_bytes) * unit;
}

InferKv kv_views(const ModelConfig& c, KvFormat format, int64_t n_row, const Buffer& buffer) {
  const int64_t stride = n_row * c.kv_width(), n = c.num_hidden_layers * stride;
  const auto bytes = static_cast<size_t>(n) * kv_element_bytes(format);
  char* p = static_cast<char*>(buffer.data());
  InferKv kv{.format = format, .k = p, .v = p + bytes, .layer_stride = stride};
  if (format == KvFormat::i8) {
    kv.k_scale = reinterpret_cast<float*>(p + 2 * bytes);
    kv.v_scale = kv.k_scale + n / c.head_dim;
  }
  return kv;
}

// What the system could give without swapping; where it does not say (not Linux), what is free.
static size_t available_memory() {
  std::ifstream in("/proc/meminfo");
  for (std::string key; in >> key;) {
    size_t kib = 0;
    if (key == "MemAvailable:" && in >> kib) return kib * 1024;
    in.ignore(1 << 10, '\n');
  }
  return static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

static int64_t plan_kv_rows(const ModelConfig& config, const EngineOptions& o, int64_t context) {
  const size_t free = o.device.on_gpu() ? cuda_free_bytes() : available_memory();
  const auto fit = static_cast<int64_t>(static_cast<double>(free) * o.kv_memory_share) /
                   static_cast<int64_t>(kv_bytes_per_token(config, o.kv));
  // Concatenation needs the old run beside the new one.
  const int64_t useful = (o.kv_layout == KvLayout::concat ? 3 : 1) * o.max_sequences * context;
  return std::min<int64_t>({fit, useful, INT32_MAX});
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t step_bucket(int64_t n) {
  if (n <= 16) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
  return n <= 128 ? round_up(n, 16) : n <= 512 ? round_up(n, 64) : round_up(n, 256);
}

RunnerLimits plan_limits(const ModelConfig& config, const EngineOptions& o) {
  RunnerLimits l;
  const int64_t most = config.max_position_embeddings;
  l.context = o.context == 0 ? most : o.context;
  if (l.context < 2 || l.context > most)
    throw Error("context", fmt::format("2 to {} tokens (the model's max_position_embeddings)", most),
                fmt::format("{}", l.context));
  if (o.max_sequences < 1 || o.max_sequences > 4096)
    throw Error("sequences at once", "1 to 4096", fmt::format("{}", o.max_sequences));
  const bool power = o.block_size > 0 && (o.block_size & (o.block_size - 1)) == 0;
  if (!power || o.block_size > 1024)
    throw Error("block size", "a power of two up to 1024", fmt::format("{}", o.block_size));
  const int64_t draft = std::max(o.ngram_draft, o.draft_tokens);
  if (std::min(o.ngram_draft, o.draft_tokens) < 0 || draft > 16)
    throw Error("draft tokens", "0 to 16", fmt::format("{}", draft));
  if (!o.device.on_gpu() && o.weights == WeightFormat::f16) throw Error("weights", "f32, bf16 or i8 on the CPU", "f16");
  const int64_t a_step = o.max_sequences * (1 + draft);
  l.max_out = std::max<int64_t>(a_step, 16);
  // Batch-invariant on a GPU: every step has this size.
  const int64_t usual = !o.device.on_gpu() ? 512 : o.batch_invariant ? 256 : 4096;
  const int64_t step = o.step_tokens > 0 ? o.step_tokens : usual;
  l.max_tok = std::max(step, a_step);
  l.max_seq = o.max_sequences;
  l.max_tok = std::min(l.max_tok, std::max<int64_t>(a_step, o.max_sequences * l.context));
  if (o.device.on_gpu()) {  // padded steps must fit
    l.max_out = step_bucket(l.max_out);
    l.max_tok = std::max(l.max_tok, l.max_out);
  }
  l.prompt_keys = l.max_tok + l.context;

  const bool paged = o.kv_layout == KvLayout::paged, concat = o.kv_layout == KvLayout::concat;
  const int64_t unit = paged ? o.block_size : concat ? 1 : l.context;
  const auto least = [&] { return concat ? 3 * l.context : (l.context + unit - 1) / unit * unit; };
  l.n_row = o.kv_tokens > 0 ? o.kv_tokens : plan_kv_rows(config, o, l.context);
  l.n_row = std::min<int64_t>((l.n_row + unit - 1) / unit * unit, INT32_MAX / unit * unit);
  if (l.n_row < least()) {
    const std::string need =
        fmt::format("room for one sequence of {} tokens ({} rows, {:.0f} MiB)", l.context, least(),
                    static_cast<double>(least()) * static_cast<double>(kv_bytes_per_token(config, o.kv)) / (1 << 20));
    throw Error("keys and values", need, fmt::format("{} rows", l.n_row),
                "lower the context, or give more memory to keys and values");
  }
  return l;
}

std::unique_ptr<Runner> make_runner(const Model& model, const EngineOptions& options, const RunnerLimits& limits) {
  if (options.device.on_gpu()) return std::make_unique<CudaRunner>(model, options, limits);
  return std::make_unique<CpuRunner>(model, options, limits);
}

}  // namespace mm
