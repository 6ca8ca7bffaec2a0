// Drawing tokens from logits, row by row, with parameters of each row: what engine/sampler.h does on the host and
// cuda/sample.cu on the GPU, with the same order of filters and the same random numbers.
#pragma once

#include <cstdint>

namespace mm {

// Penalties, biases: one change of one logit. Applied in this order to the raw logit x:
//   x = x > 0 ? x / repetition : x * repetition where `seen`; x -= presence + frequency * count where count > 0; x +=
//   bias
struct LogitEdit {
  int32_t id = 0;
  int32_t seen = 0;   // 1: in the prompt or generated
  int32_t count = 0;  // times generated
  float bias = 0;
};

struct RowSampling {
  float temperature = 1.0f;  // 0: the largest logit, lowest id on a tie
  int32_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // what comes after the token whose cumulated probability exceeds top_p goes
  float min_p = 0.0f;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  uint64_t seed = 0, stream = 0, index = 0;  // philox4x32(seed, stream, index), index = tokens before this one
  int32_t edits_begin = 0, edits_end = 0;    // of the step's list of LogitEdit
  int32_t mask = -1;                         // index of a bit mask [ceil(n_vocab / 32)], bit set = allowed; -1: all
};

}  // namespace mm
