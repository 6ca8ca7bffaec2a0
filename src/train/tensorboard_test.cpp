#include "train/tensorboard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

static std::string hex(std::string_view bytes) {
  std::string out;
  for (const char b : bytes) out += fmt::format("{:02x}", static_cast<uint8_t>(b));
  return out;
}

// The bytes that the tensorboard package (2.21) writes for the same events.
TEST(TensorBoard, BytesEqualThePackages) {
  const std::string dir = testing::TempDir() + "tb_golden";
  std::filesystem::remove_all(dir);
  TensorBoardWriter writer(dir, 1700000000.5, 30);
  writer.add_scalars(300, 1700000001.25, std::vector<Scalar>{{"train/loss", 2.5}, {"lr", 5e-4}});
  writer.add_scalars(5'000'000'000, 1700000002.0, std::vector<Scalar>{{"损失", std::nan("")}});
  EXPECT_NE(writer.path().find(dir + "/events.out.tfevents.1700000000."), std::string::npos);
  EXPECT_EQ(hex(read_file(writer.path())),
            "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b3531100f000000000000006d53"
            "2b090900002040fc54d941101f3a020801217f83722c00000000000000f4aecc450900005040fc54d94110ac022a1e0a110a"
            "0a747261696e2f6c6f737315000020400a090a026c72156f12033a256b95c7200000000000000029eda9500900008040fc54"
            "d9411080e497d0122a0f0a0d0a06e68d9fe5a4b1150000c07fb45c7482");
}

TEST(TensorBoard, EveryWriterHasAFileOfItsOwn) {
  const std::string dir = testing::TempDir() + "tb_two";
  std::filesystem::remove_all(dir);
  const TensorBoardWriter a(dir, 1700000000), b(dir, 1700000000, 5);
  EXPECT_NE(a.path(), b.path());
  EXPECT_LT(read_file(a.path()).size(), read_file(b.path()).size());  // b tells which steps to forget
}

TEST(TensorBoard, UnwritableFolderIsAnError) {
  const std::string file = testing::TempDir() + "tb_file";
  write_file(file, "x");
  EXPECT_THROW(TensorBoardWriter(file, 0), Error);
}

}  // namespace mm
