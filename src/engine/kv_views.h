// Where the keys and values of all layers lie in one buffer.
#pragma once

#include "engine/runner.h"
#include "tensor/buffer.h"

namespace mm {

// Keys of all layers, values of all layers, then the scales of int8 ones. buffer: n_row * kv_bytes_per_token.
InferKv kv_views(const ModelConfig& config, KvFormat format, int64_t n_row, const Buffer& buffer);

}  // namespace mm
