#include "train/metrics.h"

#include <chrono>
#include <cmath>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/log.h"

namespace mm {

static double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// True for a whole line of a step that the resumed run will not write again. A run from the beginning writes all again,
// step 0 (validation before training) too.
static bool keep_line(std::string_view line, int64_t resume_step) {
  const auto parsed = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object()) return false;
  const auto step = parsed.find("step");
  return step != parsed.end() && step->is_number_integer() && resume_step > 0 && step->get<int64_t>() <= resume_step;
}

static void drop_later_lines(const std::string& path, int64_t resume_step) {
  if (!file_exists(path)) return;
  const MappedFile file(path);
  std::string_view rest = file.text();
  AtomicFile kept(path);
  int64_t dropped = 0;
  while (!rest.empty()) {
    const size_t end = rest.find('\n');
    if (end == std::string_view::npos) {  // no newline: the writer was killed in the middle
      dropped++;
      break;
    }
    if (keep_line(rest.substr(0, end), resume_step)) kept.write(rest.substr(0, end + 1));
    else dropped++;
    rest.remove_prefix(end + 1);
  }
  if (dropped == 0) return;
  kept.commit();
  log_info("{}: removed {} lines after step {}", path, dropped, resume_step);
}

static std::string prepare(const std::string& dir, int64_t resume_step) {
  make_dirs(dir);
  std::string path = path_join(dir, "metrics.jsonl");
  drop_later_lines(path, resume_step);
  return path;
}

Metrics::Metrics(const std::string& dir, int64_t resume_step)
    : lines_(prepare(dir, resume_step)), tensorboard_(path_join(dir, "tensorboard"), wall_seconds(), resume_step) {}

void Metrics::log(int64_t step, std::span<const Scalar> scalars) {
  const double time = wall_seconds();
  ordered_json line{{"step", step}, {"time", std::round(time * 1000) / 1000}};
  for (const auto& [tag, value] : scalars) {
    if (std::isfinite(value)) line[std::string(tag)] = value;
    else line[std::string(tag)] = nullptr;
  }
  lines_.write(line.dump() + "\n");
  tensorboard_.add_scalars(step, time, scalars);
}

}  // namespace mm
