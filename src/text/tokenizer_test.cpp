#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/fs.h"
#include "base/json.h"

namespace mm {
namespace {

const std::string kShared = std::string(MM_SOURCE_DIR) + "/../shared";

TEST(TokenizerOracle, EncodesAndDecodesAsTransformers) {
  if (!dir_exists(kShared)) GTEST_SKIP() << "NOT CHECKED: " << kShared << " is missing (the oracle's tokenizer cases)";
  const Tokenizer t = Tokenizer::load(kShared + "/models/minimind-tokenizer");
  EXPECT_EQ(t.vocab_size(), 6400);
  EXPECT_EQ(t.bos_id(), 1);
  EXPECT_EQ(t.eos_id(), 2);
  EXPECT_EQ(t.pad_id(), 0);
  std::ifstream in(kShared + "/oracle/tokenizer/encode.jsonl");
  std::string line;
  int rows = 0;
  while (std::getline(in, line)) {
    const ordered_json row = parse_json(line, "encode.jsonl");
    const auto text = row["text"].get<std::string>();
    const auto ids = row["ids"].get<std::vector<int32_t>>();
    ASSERT_EQ(t.encode(text), ids) << text;
    ASSERT_EQ(t.decode(ids), row["decoded"].get<std::string>());
    ASSERT_EQ(t.decode(ids, true), row["decoded_skip_special"].get<std::string>());
    rows++;
  }
  EXPECT_EQ(rows, 782);
}

}  // namespace
}  // namespace mm
