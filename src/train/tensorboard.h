// Scalars in the event files that TensorBoard reads: TFRecord frames around hand-encoded protobuf Event messages.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/fs.h"

namespace mm {

using Scalar = std::pair<std::string_view, double>;  // tag, value

// Appends to one new file `events.out.tfevents.<seconds>.<host>.<pid>.<n>` in `dir` (made if missing). Every call
// reaches the operating system before it returns, so a killed run loses nothing. Not thread safe. Throws Error when a
// write fails.
class TensorBoardWriter {
 public:
  // wall_time: seconds since 1970. resume_step >= 0: TensorBoard is told to forget what earlier files of `dir` hold for
  // steps after it.
  TensorBoardWriter(const std::string& dir, double wall_time, int64_t resume_step = -1);

  // One event with all scalars (stored as fp32, NaN and infinities included).
  void add_scalars(int64_t step, double wall_time, std::span<const Scalar> scalars);
  const std::string& path() const { return file_.path(); }

 private:
  void write_record();

  AppendFile file_;
  std::string event_, frame_;
};

}  // namespace mm
