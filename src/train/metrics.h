// Where a run's numbers go: one line a step in metrics.jsonl, and TensorBoard event files.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "train/tensorboard.h"

namespace mm {

// Writes `dir`/metrics.jsonl ({"step", "time", tag: value, ...}, values that are not finite as null) and
// `dir`/tensorboard/. Every log() reaches the operating system before it returns. Not thread safe; one rank owns it.
// Throws Error when a file cannot be written.
class Metrics {
 public:
  // A run that starts or goes on after optimizer step `resume_step` (0: from the beginning). Lines of later steps, and
  // a line cut short by a crash, are removed from metrics.jsonl; TensorBoard is told to forget them.
  Metrics(const std::string& dir, int64_t resume_step);

  void log(int64_t step, std::span<const Scalar> scalars);
  void log(int64_t step, std::initializer_list<Scalar> scalars) {
    log(step, std::span(scalars.begin(), scalars.size()));
  }

 private:
  AppendFile lines_;
  TensorBoardWriter tensorboard_;
};

}  // namespace mm
