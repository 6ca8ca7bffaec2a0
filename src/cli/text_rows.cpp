#include "cli/text_rows.h"

#include "base/error.h"
#include "base/progress.h"
#include "base/thread_team.h"
#include "data/jsonl.h"
#include "data/sample_stream.h"
#include "data/samples.h"

namespace mm {

static void append_contents(const ordered_json& messages, std::string& out) {
  for (const ordered_json& m : messages) {
    const auto content = m.find("content");
    if (content == m.end() || !content->is_string() || content->get_ref<const std::string&>().empty()) continue;
    if (!out.empty()) out += '\n';
    out += content->get_ref<const std::string&>();
  }
}

static std::string text_of(Sample sample) {
  if (sample.kind == SampleKind::pretrain) return std::move(sample.text);
  std::string text;
  append_contents(sample.messages, text);
  append_contents(sample.rejected, text);
  return text;
}

int64_t stream_texts(const std::vector<std::string>& paths, const std::string& title,
                     const std::function<void(const std::vector<std::string>&)>& sink) {
  std::vector<JsonlReader> readers;  // all opened first: a missing file is known before work starts
  std::vector<SampleKind> kinds;
  uint64_t total = 0, before = 0;
  for (const std::string& path : paths) {
    total += readers.emplace_back(path).file_bytes();
    kinds.push_back(detect_kind(path));
  }
  constexpr size_t kChunks = 32;
  std::vector<SampleParser> parsers(static_cast<size_t>(num_threads()));
  std::vector<JsonlChunk> chunks(kChunks);
  std::vector<std::vector<StreamedRow>> rows(kChunks);
  std::vector<std::vector<std::string>> texts(kChunks);
  BadRows bad;
  Progress progress(title, static_cast<int64_t>(total), "B");
  std::vector<std::string> batch;
  for (size_t file = 0; file < paths.size(); file++) {
    for (bool more = true; more;) {
      size_t n = 0;
      while (n < kChunks && (more = readers[file].next(chunks[n]))) n++;
      parallel_dynamic(static_cast<int64_t>(n), [&](int64_t i, int thread) {
        const auto k = static_cast<size_t>(i);
        rows[k].clear();
        texts[k].clear();
        for_each_line(chunks[k], [&](int64_t line, std::string_view bytes) {
          StreamedRow& row = rows[k].emplace_back();
          row.file = static_cast<int64_t>(file);
          row.line = line;
          try {
            texts[k].push_back(text_of(parsers[static_cast<size_t>(thread)].parse(bytes, kinds[file])));
          } catch (const Error& e) {
            row.error = e.what();
          }
        });
      });
      batch.clear();
      for (size_t k = 0; k < n; k++) {
        for (const StreamedRow& row : rows[k]) bad.add(row);
        for (std::string& text : texts[k]) batch.push_back(std::move(text));
      }
      sink(batch);
      progress.set(static_cast<int64_t>(before + readers[file].position()));
    }
    before += readers[file].file_bytes();
  }
  progress.finish();
  bad.judge(paths, 0.01);
  return bad.rows - bad.bad;
}

}  // namespace mm
