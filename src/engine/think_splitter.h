// Tells thoughts from the answer while a text streams in.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mm {

// <think> and </think> themselves are left out, as are the newlines around them. A tag cut between two pushes is found.
class ThinkSplitter {
 public:
  struct Part {
    bool thinking;
    std::string text;
  };
  explicit ThinkSplitter(bool inside) : inside_(inside) {}  // inside: the prompt ended within <think>
  std::vector<Part> push(std::string_view text);
  std::vector<Part> flush();  // the stream ended

 private:
  void give(std::string_view text, std::vector<Part>& parts);

  std::string held_;
  bool inside_, skip_newlines_ = true;
};

}  // namespace mm
