// The forward and the backward pass, written as scripts of ops. They know neither training nor serving.
#pragma once

#include "model/activations.h"
#include "model/kv_cache.h"
#include "model/model.h"
#include "tensor/device.h"
#include "tensor/token_batch.h"

namespace mm {

struct DropoutKey {  // random numbers of this pass: seed of the run, number of the micro-batch
  uint64_t seed = 0, step = 0;
};

// Fills acts (and, with a cache, the rows that its plan names). Afterwards acts.h [n_tok, d_model] is the final norm's
// output, input of the LM head, and acts.aux_loss() the MoE balance loss times its coefficient. Dropout only when
// acts.train(). ids must lie in [0, vocab_size): Error otherwise, with the first bad one.
void forward(const Device& dev, Model& model, const TokenBatch& batch, Activations& acts, KvCache* cache = nullptr,
             DropoutKey key = {});

// The same in its parts: the Errors, and the pass over the batch that acts.stage holds, which adds to acts.aux. The
// pass allocates nothing and waits for nothing, so a graph can capture it.
void check_batch(Model& model, const TokenBatch& batch, const KvCache* cache = nullptr);
void forward_staged(const Device& dev, Model& model, Activations& acts, KvCache* cache = nullptr, DropoutKey key = {});

// After a forward pass with acts.train(), over the same staged batch. On entry acts.dh [n_tok, d_model] holds
// dL/d(acts.h). Adds to grads.
void backward(const Device& dev, Model& model, Activations& acts, ParamBuffer& grads, DropoutKey key = {});

}  // namespace mm
