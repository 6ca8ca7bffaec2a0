// The forward pass of inference on a GPU: tokens of many sequences over paged keys and values, to the logits of the
// wanted rows. A script of ops, like forward.h; the CPU has one fused step instead (kernels/cpu/infer.h).
#pragma once

#include "kernels/ops_infer.h"
#include "model/activations.h"
#include "model/gpu_weights.h"

namespace mm {

// Device pointers. Tokens [0, n_decode) are one a sequence and attend through the page table; the others belong to
// prompts, which `prompts` describes (its batch counts from token n_decode on).
struct PagedBatch {
  int64_t n_tok = 0, n_decode = 0, n_out = 0;
  const int32_t *ids = nullptr, *positions = nullptr, *slots = nullptr;  // [n_tok], slots negative for padding
  const int32_t *seq = nullptr, *n_key = nullptr;                        // [n_decode] row of the table, keys seen
  ops::PageTable table;
  int64_t max_key = 0;                // of the decoding rows, at most
  const int32_t* out_rows = nullptr;  // [n_out]; null: all tokens in order
  int n_new = 1 << 30;                // of a decoding row's keys, at most so many, the last ones, are of this step
  bool invariant = false;
  // Prompts: where gathered, keys are collected behind one another (kv_start, kv_len of `prompts` point there), else a
  // prompt's keys are its own tokens'.
  const StagedBatch* prompts = nullptr;
  bool gather = false;
  const int32_t* gather_start = nullptr;  // [n_prompt + 1]
  ops::PageTable prompt_table;            // of the prompts alone
  int64_t n_prompt = 0, gather_rows = 0;
};

// Scratch beside the activations, allocated once.
struct PagedScratch {
  PagedScratch(const ModelConfig& config, int64_t max_out, int64_t gather_rows, const Device& dev);
  View hidden, normed, logits;  // [max_out, d_model] twice, [max_out, n_vocab]
  View k, v;                    // [gather_rows, n_kv_head d_head]
  View squares;                 // f32 [ceil(d_model / 64), ops::most_scaled]
  Buffer buffer;
};

// Leaves the hidden states of the wanted rows behind the final norm in scratch.normed and, unless hidden_only, their
// logits in scratch.logits. Allocates nothing and waits for nothing, so a graph can capture it.
void paged_forward(const Device& dev, const GpuWeights& weights, const InferKv& kv, const PagedBatch& batch,
                   Activations& acts, PagedScratch& scratch, bool hidden_only);

}  // namespace mm
