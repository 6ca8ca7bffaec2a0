// Tells a loss spike from noise, so that one bad batch does not damage the weights.
#pragma once

#include <cstdint>
#include <vector>

#include "base/json.h"

namespace mm {

struct SpikeOptions {
  double threshold = 6.0;       // z-score above which a step is skipped; 0: never skip
  int64_t window = 128;         // losses that mean and standard deviation are taken from
  int64_t warmup = 32;          // losses to see before judging, at most `window`
  int64_t max_consecutive = 5;  // after this many skips in a row the new level is believed and the window starts again
};

// z = (loss - mean) / max(std, 0.1 % of |mean|) over the last `window` accepted losses; the floor keeps an almost
// constant loss from making every step a spike. Decisions depend on the losses seen alone, so a resumed run decides
// alike. Not thread safe.
class SpikeDetector {
 public:
  explicit SpikeDetector(SpikeOptions options);  // Error naming the field when a value is out of range

  // True: skip this step. A skipped loss does not enter the window. A loss that is not finite is always skipped, enters
  // nothing and does not count (the NaN sentry judges it).
  bool observe(double loss);
  bool never_skips() const { return options_.threshold == 0; }
  double last_z() const { return last_z_; }  // of the last finite loss; 0 while warming up
  int64_t skipped() const { return skipped_; }

  ordered_json to_json() const;  // state without the options
  void restore(const ordered_json& state,
               const std::string& where);  // Error on a malformed state; then nothing changes

 private:
  SpikeOptions options_;
  std::vector<double> window_;  // ring; next_ is the oldest once full
  int64_t next_ = 0, skipped_ = 0, consecutive_ = 0;
  double last_z_ = 0;
};

}  // namespace mm
