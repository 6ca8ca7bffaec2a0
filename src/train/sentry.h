// Finds where a NaN or infinity came from.
#pragma once

#include <string>
#include <vector>

#include "data/dataset.h"
#include "train/train_step.h"

namespace mm {

// Explains a step that was not finite, in one line: the first bad tensor (a weight, an activation of a layer, the loss,
// or a gradient) and, for activations, the row of the data set it came from. Runs the forward pass of step `number`
// again, with the same elements dropped, and looks at the layers' outputs in order.
std::string explain_non_finite(const Device& dev, TrainStep& step, const std::vector<TokenBatch>& micro_batches,
                               int64_t number, const TokenDataset& data);

}  // namespace mm
