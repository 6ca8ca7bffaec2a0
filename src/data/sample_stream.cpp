#include "data/sample_stream.h"

#include <memory>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/thread_team.h"
#include "data/jsonl.h"

namespace mm {

namespace {

void process_chunk(const JsonlChunk& chunk, int64_t file, SampleParser& parser, const SampleEncoder* encoder,
                   const SampleOptions& options, std::vector<StreamedRow>& out) {
  out.clear();
  for_each_line(chunk, [&](int64_t line, std::string_view text) {
    StreamedRow& row = out.emplace_back();
    row.file = file;
    row.line = line;
    try {
      const Sample sample = parser.parse(text, options.kind);
      if (encoder != nullptr) row.sequences = encoder->encode(sample, row_number(file, line));
      else render_sample(sample, options, row_number(file, line));
    } catch (const Error& e) {
      row.sequences.clear();
      row.error = e.what();
    }
  });
}

}  // namespace

void stream_samples(const std::vector<std::string>& paths, const Tokenizer* tokenizer, const SampleOptions& options,
                    const std::string& title, const std::function<void(StreamedRow&)>& sink) {
  std::unique_ptr<SampleEncoder> encoder;
  if (tokenizer != nullptr) encoder = std::make_unique<SampleEncoder>(*tokenizer, options);
  std::vector<JsonlReader> readers;  // all opened first: a missing file is known before work starts
  uint64_t total = 0, before = 0;
  for (const std::string& path : paths) total += readers.emplace_back(path).file_bytes();

  const size_t threads = static_cast<size_t>(num_threads()), n_chunks = threads * 4;
  std::vector<SampleParser> parsers(threads);
  std::vector<JsonlChunk> chunks(n_chunks);
  std::vector<std::vector<StreamedRow>> results(n_chunks);
  Progress progress(title, static_cast<int64_t>(total), "B");
  int64_t rows = 0;
  for (size_t file = 0; file < readers.size(); file++) {
    for (bool more = true; more;) {
      size_t n = 0;
      while (n < n_chunks && (more = readers[file].next(chunks[n]))) n++;
      parallel_dynamic(static_cast<int64_t>(n), [&](int64_t i, int thread) {
        const auto k = static_cast<size_t>(i);
        process_chunk(chunks[k], static_cast<int64_t>(file), parsers[static_cast<size_t>(thread)], encoder.get(),
                      options, results[k]);
      });
      for (size_t k = 0; k < n; k++) {
        for (StreamedRow& row : results[k]) sink(row);
        rows += static_cast<int64_t>(results[k].size());
      }
      progress.set(static_cast<int64_t>(before + readers[file].position()),
                   human_count(static_cast<double>(rows)) + " rows");
    }
    before += readers[file].file_bytes();
  }
  progress.finish();
}

std::string BadRow::text(const std::vector<std::string>& paths) const {
  return fmt::format("{}:{}: {}", paths[static_cast<size_t>(file)], line, reason);
}

void BadRows::add(const StreamedRow& row) {
  rows++;
  if (row.error.empty()) return;
  bad++;
  if (first.size() < max_kept) first.push_back({row.file, row.line, row.error});
}

void BadRows::judge(const std::vector<std::string>& paths, double max_share) const {
  const std::string names = fmt::format("{}", fmt::join(paths, ", "));
  if (rows == 0) throw Error(names, "at least one row", "an empty data set");
  if (bad == 0) return;
  const std::string example = first[0].text(paths);
  if (bad == rows || static_cast<double>(bad) > max_share * static_cast<double>(rows)) {
    throw Error(names, fmt::format("at most {}% bad rows", max_share * 100),
                fmt::format("{} of {} ({})", bad, rows, example), "run `minimind data check` to list them");
  }
  log_warn("{} of {} rows are bad and left out, the first: {} (`minimind data check` lists them)", bad, rows, example);
}

}  // namespace mm
