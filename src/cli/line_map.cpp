#include "cli/line_map.h"

#include <cstdio>
#include <exception>
#include <vector>

#include "base/error.h"
#include "base/thread_team.h"
#include "data/jsonl.h"

namespace mm {

static void write_out(const std::string& bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size() || std::fflush(stdout) != 0) {
    throw system_error("write failed", "standard output");
  }
}

void map_json_lines(
    const std::function<void(const ordered_json& line, const std::string& where, std::string& out)>& f) {
  struct Result {
    std::string out;
    std::exception_ptr failure;
  };
  JsonlReader reader("/dev/stdin");
  std::vector<JsonlChunk> chunks(static_cast<size_t>(num_threads()) * 4);
  std::vector<Result> results(chunks.size());
  for (bool more = true; more;) {
    size_t n = 0;
    while (n < chunks.size() && (more = reader.next(chunks[n]))) n++;
    parallel_dynamic(static_cast<int64_t>(n), [&](int64_t i, int) {
      Result& r = results[static_cast<size_t>(i)];
      r.out.clear();
      try {
        for_each_line(chunks[static_cast<size_t>(i)], [&](int64_t number, std::string_view bytes) {
          const std::string where = fmt::format("standard input:{}", number);
          std::string out;
          f(parse_json(bytes, where), where, out);
          r.out += out;
          r.out += '\n';
        });
      } catch (...) {
        r.failure = std::current_exception();
      }
    });
    for (size_t i = 0; i < n; i++) {
      write_out(results[i].out);
      if (results[i].failure) std::rethrow_exception(results[i].failure);
    }
  }
}

}  // namespace mm
