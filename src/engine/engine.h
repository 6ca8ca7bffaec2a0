// The engine as a service: one thread that schedules, runs the model and hands out tokens; any thread submits.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine_options.h"
#include "engine/request.h"
#include "model/model.h"
#include "text/tokenizer.h"

namespace mm {

enum class SubmitStatus { accepted, queue_full, stopping };

struct Submitted {
  SubmitStatus status = SubmitStatus::accepted;
  uint64_t id = 0;                 // for cancel()
  double retry_after_seconds = 0;  // when the queue is full: an estimate
};

// A consistent picture of a moment, for /metrics, /health and the page.
struct EngineStats {
  int64_t n_waiting = 0, n_running = 0;
  int64_t n_block = 0, n_block_used = 0, n_block_cached = 0;  // used by sequences; kept for their prefix alone
  int64_t block_size = 0;
  int64_t n_step = 0, n_submitted = 0, n_rejected = 0, n_finished = 0, n_cancelled = 0, n_timed_out = 0, n_failed = 0;
  int64_t n_preempted = 0;
  int64_t prompt_tokens = 0, cached_tokens = 0;  // of ended requests; cached: of them, found in the prefix cache
  int64_t computed_tokens = 0;                   // of all steps, prompts and proposals included
  int64_t generated_tokens = 0, draft_tokens = 0, accepted_tokens = 0;
  double seconds = 0;  // since start
};

// The physical blocks: who owns each.
struct BlockMap {
  struct Owner {
    uint64_t request = 0;
    int choice = 0;
    std::vector<int32_t> blocks;  // in order of the sequence
    int64_t n_tok = 0;            // whose keys lie there
    bool running = false;
  };
  int64_t n_block = 0, block_size = 0;
  std::vector<Owner> owners;
  std::vector<int32_t> cached;  // blocks without owner whose content may be reused
};

class Engine {
 public:
  // Packs the weights for the device, plans memory, starts the thread. The tokenizer gives texts. Error when the
  // options or the memory do not do.
  // draft: a smaller model of the same vocabulary for speculative decoding, or null; see EngineOptions::draft_tokens.
  Engine(const Model& model, std::optional<Tokenizer> tokenizer, const EngineOptions& options,
         const Model* draft = nullptr);
  ~Engine();  // cancels what is left
  // Error (of bad input) when the request makes no sense; it names the field. Otherwise takes it or says why not.
  Submitted submit(EngineRequest request);
  void cancel(uint64_t id);         // events stop after the choice's finished one; unknown ids are ignored
  void drain(double seconds);       // takes nothing new, waits for what runs, at most so long, then cancels
  EngineStats stats() const;        // any thread
  BlockMap block_map() const;       // any thread; of the last finished step
  int64_t context() const;          // tokens a sequence at most
  std::string description() const;  // "cpu, 4 threads, bf16 weights, bf16 KV, 512 blocks of 16"
  const EngineOptions& options() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mm
