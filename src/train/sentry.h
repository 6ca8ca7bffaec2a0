// Finds where a NaN or infinity came from.
#pragma once

#include <string>
#include <vector>

#include "data/dataset.h"
#include "train/train_step.h"

namespace mm {

// Explains a step that was not finite, in one line: the first bad tensor (a weight, an activation of a layer, the loss,
// or a gradient) and, for activations, the rows of the data set it came from. Runs the forward pass again, layer by
// layer outputs are looked at in order.
std::string explain_non_finite(const Device& dev, Model& model, TrainStep& step,
                               const std::vector<TokenBatch>& micro_batches, const TokenDataset& data);

}  // namespace mm
