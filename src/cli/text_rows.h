// The plain text of data set rows, for commands that look at text and not at samples.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace mm {

// Calls sink(texts) on the calling thread with the texts of the files' rows, in order, a few MiB at a time: the text of
// a pretraining row, the contents of a conversation joined by newlines (chosen, then rejected, for a preference). Files
// may be .gz or .zst. Bad rows are left out, counted and reported; Error above 1% of them or if there is no row.
// Returns the number of good rows. Shows a progress bar.
int64_t stream_texts(const std::vector<std::string>& paths, const std::string& title,
                     const std::function<void(const std::vector<std::string>&)>& sink);

}  // namespace mm
