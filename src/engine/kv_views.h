// Where the keys and values of all layers lie in one buffer.
#pragma once

#include "engine/runner.h"
#include "tensor/buffer.h"

namespace mm {

// Rows to allocate on the CPU, where each kv head's rows lie in one piece: n_row and a few more, so that the pieces
// begin at different places of a large page. Otherwise all of them reach a new page with the same token, and the system
// needs 2.5 ms for each (64M, 32,768 rows: a stall of 170 ms). Pieces below a page stay as they are.
int64_t staggered_rows(const ModelConfig& config, KvFormat format, int64_t n_row);

// Keys of all layers, values of all layers, then the scales of int8 ones. buffer: n_row * kv_bytes_per_token.
InferKv kv_views(const ModelConfig& config, KvFormat format, int64_t n_row, const Buffer& buffer);

}  // namespace mm
