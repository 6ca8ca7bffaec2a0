// How the engine runs: device, memory, scheduling. Flags of `serve`, `generate`, `chat` and `bench`.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/infer.h"
#include "tensor/device.h"

namespace mm {

enum class KvLayout {
  paged,         // blocks of a pool, shared prefixes, copy on write
  preallocated,  // one run of `context` rows a sequence
  concat,        // a new run a step, the old one copied into it: the naive torch.cat of the course
};

struct EngineOptions {
  Device device;
  WeightFormat weights = WeightFormat::bf16;
  KvFormat kv = KvFormat::bf16;
  KvLayout kv_layout = KvLayout::paged;
  int64_t block_size = 16;       // tokens, a power of two
  int64_t kv_tokens = 0;         // rows of the pool; 0: from the memory left (see kv_memory_share)
  double kv_memory_share = 0.5;  // CPU: of free memory, at most what all sequences can use; GPU: of what is left
  int64_t context = 0;           // tokens a sequence at most; 0: the model's
  int64_t max_sequences = 64;    // running at once
  int64_t step_tokens = 0;       // tokens of a step at most (prefill is cut into chunks); 0: 512 CPU, 4096 GPU
  int64_t queue_limit = 256;     // requests that wait because they cannot run; more are refused
  bool static_batch = false;     // a batch starts together and a new one only when all have ended
  bool prefix_cache = true;
  bool batch_invariant = false;
  bool warm_up = false;      // before the first request: see Runner::warm_up
  int64_t ngram_draft = 0;   // speculative decoding: tokens proposed by looking up the last n-gram; 0: off
  int64_t draft_tokens = 0;  // the same by a draft model, which must then be given; 0: off
};

// Errors on unknown names; `flag` says where the name stands.
KvLayout kv_layout_from_name(const std::string& name, const char* flag);
KvFormat kv_format_from_name(const std::string& name, const char* flag);
WeightFormat weight_format_from_name(const std::string& name, const char* flag);
const char* weight_format_name(WeightFormat format);
const char* kv_format_name(KvFormat format);
const char* kv_layout_name(KvLayout layout);
size_t kv_element_bytes(KvFormat format);

}  // namespace mm
