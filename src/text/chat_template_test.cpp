#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/fs.h"

namespace mm {
namespace {

const std::string kShared = std::string(MM_SOURCE_DIR) + "/../shared";

TEST(ChatTemplateOracle, RendersAsTransformers) {
  if (!dir_exists(kShared)) GTEST_SKIP() << "NOT CHECKED: " << kShared << " is missing (the oracle's template cases)";
  std::ifstream in(kShared + "/oracle/tokenizer/chat_template.jsonl");
  std::string line;
  int rows = 0;
  while (std::getline(in, line)) {
    const ordered_json row = parse_json(line, "chat_template.jsonl");
    const ChatOptions options{row["add_generation_prompt"].get<bool>(), row["open_thinking"].get<bool>()};
    ASSERT_EQ(render_chat(row["messages"], row["tools"], options), row["text"].get<std::string>()) << line;
    rows++;
  }
  EXPECT_EQ(rows, 72);
  const ordered_json config = load_json(kShared + "/models/minimind-tokenizer/tokenizer_config.json");
  EXPECT_EQ(minimind_chat_template(), config["chat_template"].get<std::string>());
}

}  // namespace
}  // namespace mm
