// The model's step on the CPU: one thread team for the whole step, spin barriers between its stages, weights packed for
// the machine's instruction set (AMX, AVX-512 with BF16 and VNNI, AVX2, scalar). From one token to a prefill chunk.
#pragma once

#include "kernels/infer.h"

namespace mm::cpu {

// Bytes of a packed matrix [n, k], 64-byte aligned, f32, bf16 or i8; k need not be a multiple of anything.
size_t packed_bytes(WeightFormat format, int64_t n, int64_t k);
// Packs w [n, k] fp32 row-major into `to`. Rounds to bf16 or quantizes. Any thread.
void pack_matrix(WeightFormat format, void* to, const float* w, int64_t n, int64_t k);
// Rows [begin, end) of a packed matrix as fp32 [end - begin, k]: what the products compute with. For tests.
void unpack_rows(const InferMatrix& w, int64_t begin, int64_t end, float* out);

// Scratch of infer_step for at most so many tokens and wanted rows and today's num_threads(), 64-byte aligned.
size_t infer_scratch_bytes(const InferModel& model, int64_t max_tok, int64_t max_out);

// Arithmetic: f32 weights: fp32 throughout. bf16: operands of products rounded to bf16, fp32 sums; i8 with few rows:
// activations quantized like the weights (groups of 32, int32 sums in a group); with many rows: weights to bf16.
// batch_invariant: a token's result depends on its own sequence alone, bit for bit, whatever else is in the step and
// however its prompt was cut into chunks. Without it results may differ in the last bits with the number of rows.
// Call from one thread at a time; uses parallel_team. Deterministic for the same step and thread count.
void infer_step(const InferModel& model, const InferKv& kv, const InferStep& step, void* scratch, bool batch_invariant);

}  // namespace mm::cpu
