#include "formats/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>

#include "base/fs.h"
#include "base/json.h"
#include "formats/tensor_convert.h"

namespace mm {
namespace {

class SafetensorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/mm_safetensors_XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string path(const std::string& name) const { return path_join(dir_, name); }
  std::string dir_;
};

std::string file_bytes(const std::string& header, size_t data_bytes) {
  std::string out(8, '\0');
  for (size_t i = 0; i < 8; i++) out[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  return out + header + std::string(data_bytes, '\1');
}

std::string error_of(const std::string& header, size_t data_bytes) {
  try {
    SafetensorsFile::from_bytes(file_bytes(header, data_bytes), "x.safetensors");
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)

TEST_F(SafetensorsTest, RoundTripOfEveryTypeAndStride) {
  std::vector<float> a(6 * 10);
  for (size_t i = 0; i < a.size(); i++) a[i] = static_cast<float>(i) * 0.37f - 3.0f;
  std::vector<int64_t> ids = {1, -2, 1LL << 40};
  std::vector<uint8_t> flags = {1, 0, 1, 1, 0};
  float scalar = 2.5f;
  const View whole(a.data(), DType::f32, {6, 10});
  const View part = whole.col_slice(2, 7);  // strided rows
  const std::vector<TensorToWrite> tensors = {
      {"flags", View(flags.data(), DType::u8, {5}), DType::u8},
      {"a.f16", whole, DType::f16},
      {"a.bf16", part, DType::bf16},
      {"a", part, DType::f32},
      {"ids \"quoted\"\n模型", View(ids.data(), DType::i64, {3}), DType::i64},
      {"scalar", View(&scalar, DType::f32, {}), DType::f32},
      {"empty", View(nullptr, DType::f32, {0, 4}), DType::f32},
  };
  write_safetensors(path("t.safetensors"), tensors, {{"step", "7"}});
  const auto file = SafetensorsFile::open(path("t.safetensors"));
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"step", "7"}}));
  EXPECT_EQ(file.entries().size(), tensors.size());
  EXPECT_EQ(file.find("nothing"), nullptr);

  const View back = file.at("a", {6, 5}).view();
  const View f16 = file.at("a.f16", {6, 10}).view(), bf16 = file.at("a.bf16").view();
  EXPECT_EQ(back.dtype, DType::f32);
  EXPECT_EQ(f16.dtype, DType::f16);
  for (int64_t r = 0; r < 6; r++) {
    for (int64_t c = 0; c < 5; c++) {
      const float want = a[static_cast<size_t>(r * 10 + c + 2)];
      EXPECT_EQ(back.f32()[r * 5 + c], want);
      EXPECT_EQ(bf16.as<uint16_t>()[r * 5 + c], float_to_bf16(want));
      EXPECT_EQ(f16.as<uint16_t>()[r * 10 + c + 2], float_to_f16(want));
    }
  }
  const View i = file.at("ids \"quoted\"\n模型", {3}).view();
  EXPECT_EQ(std::memcmp(i.data, ids.data(), 24), 0);
  EXPECT_EQ(file.at("flags").view().as<uint8_t>()[3], 1);
  EXPECT_EQ(file.at("scalar", Shape{}).view().f32()[0], 2.5f);
  EXPECT_EQ(file.at("empty").numel(), 0);
  EXPECT_EQ(file.at("empty").view().shape, (Shape{0, 4}));
}

// The bytes themselves, against the format's specification.
TEST_F(SafetensorsTest, WritesTheSpecifiedBytes) {
  const float x[2] = {1.0f, -2.0f};
  const std::vector<TensorToWrite> tensors = {
      {"h", View(const_cast<float*>(x), DType::f32, {2}), DType::bf16},
      {"x", View(const_cast<float*>(x), DType::f32, {1, 2}), DType::f32},
  };
  write_safetensors(path("b.safetensors"), tensors);
  const std::string bytes = read_file(path("b.safetensors"));
  const size_t n = static_cast<unsigned char>(bytes[0]);
  ASSERT_EQ(bytes.substr(1, 7), std::string(7, '\0'));
  EXPECT_EQ((8 + n) % 8, 0u);  // tensors start aligned
  const auto header = json::parse(bytes.substr(8, n));
  EXPECT_EQ(header, json::parse(R"({"__metadata__": {"format": "pt"},
      "x": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
      "h": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}})"));
  EXPECT_EQ(bytes.substr(8 + n), std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0\x80\x3f\x00\xc0", 12));
}

TEST_F(SafetensorsTest, NoTensorsAtAll) {
  write_safetensors(path("none.safetensors"), {});
  EXPECT_TRUE(SafetensorsFile::open(path("none.safetensors")).names().empty());
}

TEST_F(SafetensorsTest, HostileHeaders) {
  const std::string ok = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(error_of(ok, 8), "no error");
  EXPECT_EQ(error_of(ok + "   ", 8), "no error");  // padded with spaces
  EXPECT_HAS(error_of(ok, 7), "truncated");
  EXPECT_HAS(error_of(ok, 9), "8 bytes of tensors");
  EXPECT_HAS(error_of("[]", 0), "begins with {");
  EXPECT_HAS(error_of("", 0), "begins with {");
  EXPECT_HAS(error_of("{", 0), "JSON header");
  EXPECT_HAS(error_of(ok + "x", 8), "JSON header");
  EXPECT_HAS(error_of("{\"\xff\":{}}", 0), "JSON header");
  EXPECT_HAS(error_of(R"({"a":1})", 0), "an object for every tensor");
  EXPECT_HAS(error_of(R"({"a":{}})", 0), "one of them missing");
  EXPECT_HAS(error_of(R"({"a":{"b":{}}})", 0), "tensor \"a\"");
  EXPECT_HAS(error_of(R"({"__metadata__":{"a":1}})", 0), "strings only");
  EXPECT_HAS(error_of(R"({"__metadata__":{"a":"1","a":"2"}})", 0), "twice");
  EXPECT_HAS(error_of(R"({"__metadata__":{},"__metadata__":{}})", 0), "twice");
  EXPECT_HAS(error_of(R"({"a":{"dtype":"F32","dtype":"F32"}})", 0), "twice");
  EXPECT_HAS(
      error_of(
          R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
          0),
      "\"a\" twice");
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return fmt::format(R"({{"a":{{"dtype":{},"shape":{},"data_offsets":{}}}}})", dtype, shape, offsets);
  };
  EXPECT_HAS(error_of(one("\"F33\"", "[2]", "[0,8]"), 8), "known dtype");
  EXPECT_HAS(error_of(one("1", "[2]", "[0,8]"), 8), "a string as dtype");
  EXPECT_HAS(error_of(one("[]", "[2]", "[0,8]"), 8), "a string as dtype");
  EXPECT_HAS(error_of(one("\"F32\"", "[-2]", "[0,8]"), 8), "-2");
  EXPECT_HAS(error_of(one("\"F32\"", "[2.0]", "[0,8]"), 8), "2.0");
  EXPECT_HAS(error_of(one("\"F32\"", "[[2]]", "[0,8]"), 8), "a list");
  EXPECT_HAS(error_of(one("\"F32\"", "2", "[0,8]"), 8), "a number");
  EXPECT_HAS(error_of(one("\"F32\"", "[18446744073709551615]", "[0,8]"), 8), "2^63");
  EXPECT_HAS(error_of(one("\"F32\"", "[4294967296,4294967296]", "[0,8]"), 8), "2^63");
  EXPECT_HAS(error_of(one("\"F32\"", "[0,4294967296,4294967296]", "[0,0]"), 0), "2^63");
  EXPECT_HAS(error_of(one("\"F32\"", "[2305843009213693954]", "[0,8]"), 8), "2^63");
  EXPECT_HAS(error_of(one("\"F32\"", "[2]", "[0]"), 8), "two data_offsets");
  EXPECT_HAS(error_of(one("\"F32\"", "[2]", "[0,8,8]"), 8), "two data_offsets");
  EXPECT_HAS(error_of(one("\"F32\"", "[2]", "[8,0]"), 8), "[8, 0]");
  EXPECT_HAS(error_of(one("\"F32\"", "[2]", "[0,18446744073709551615]"), 8), "within 8 bytes");
  EXPECT_HAS(error_of(one("\"F32\"", "[3]", "[0,8]"), 8), "12 bytes");
  EXPECT_HAS(error_of(one("\"F32\"", "[2]", "[8,16]"), 16), "no gaps");
  EXPECT_HAS(
      error_of(
          R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
          8),
      "tensor \"b\"");
  EXPECT_HAS(error_of(std::string(1 << 20, '{'), 0), "JSON header");
  EXPECT_HAS(error_of("{\"a\":" + std::string(1 << 20, '['), 0), "an object for every tensor");
}

TEST_F(SafetensorsTest, HostileLengths) {
  const auto open = [](const std::string& bytes) -> std::string {
    try {
      SafetensorsFile::from_bytes(bytes, "x.safetensors");
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_HAS(open(""), "at least 8 bytes");
  EXPECT_HAS(open("1234567"), "at least 8 bytes");
  EXPECT_HAS(open(std::string("\x10\0\0\0\0\0\0\0{}", 10)), "truncated");
  EXPECT_HAS(open(std::string(8, '\xff') + "{}"), "is it a safetensors file?");
  EXPECT_HAS(open("PK\x03\x04 a zip file, for example"), "is it a safetensors file?");
}

TEST_F(SafetensorsTest, UnusualTensorsAreErrorsOnlyWhenUsed) {
  const std::string header =
      R"({"deep":{"dtype":"F32","shape":[1,1,1,1,2],"data_offsets":[0,8]},)"
      R"("u16":{"dtype":"U16","shape":[4],"data_offsets":[8,16]},"fp8":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[16,19]},)"
      R"("odd":{"dtype":"F16","shape":[2],"data_offsets":[19,23]}})";
  // The data section starts at a multiple of 8, so "odd" lies on an odd address.
  const auto file =
      SafetensorsFile::from_bytes(file_bytes(header + std::string((8 - header.size() % 8) % 8, ' '), 23), "u");
  EXPECT_EQ(file.entries().size(), 4u);
  EXPECT_THROW(file.at("deep").view(), Error);
  EXPECT_THROW(file.at("u16").view(), Error);
  EXPECT_THROW(file.at("fp8").dtype(), Error);
  EXPECT_THROW(file.at("odd").view(), Error);
  std::vector<float> odd(2);
  file.at("odd").read_floats(View(odd.data(), DType::f32, {2}));
  EXPECT_EQ(odd[0], f16_to_float(0x0101));
  EXPECT_EQ(file.at("fp8").numel(), 3);
}

TEST_F(SafetensorsTest, MissingTensorAndWrongShapeNameBothSides) {
  float x[6] = {};
  const std::vector<TensorToWrite> tensors = {{"w", View(x, DType::f32, {2, 3}), DType::f32}};
  write_safetensors(path("w.safetensors"), tensors);
  const auto file = SafetensorsFile::open(path("w.safetensors"));
  try {
    file.at("w", {3, 2});
    FAIL();
  } catch (const Error& e) {
    EXPECT_HAS(e.what(), "[3, 2]");
    EXPECT_HAS(e.what(), "[2, 3]");
    EXPECT_HAS(e.what(), "w.safetensors");
  }
  EXPECT_THROW(file.at("v"), Error);
}

TEST_F(SafetensorsTest, ReadFloatsConverts) {
  const double d[4] = {0.1, -2.0, 1e300, 3.0};
  const float f[4] = {1.5f, -0.25f, 65504.0f, NAN};
  const std::vector<TensorToWrite> tensors = {
      {"d", View(const_cast<double*>(d), DType::f64, {2, 2}), DType::f64},
      {"h", View(const_cast<float*>(f), DType::f32, {2, 2}), DType::f16},
      {"b", View(const_cast<float*>(f), DType::f32, {2, 2}), DType::bf16},
  };
  write_safetensors(path("c.safetensors"), tensors);
  const auto file = SafetensorsFile::open(path("c.safetensors"));
  std::vector<float> out(2 * 5, -7.0f);
  const View dst = View(out.data(), DType::f32, {2, 5}).col_slice(1, 3);
  file.at("d").read_floats(dst);
  EXPECT_EQ(out,
            (std::vector<float>{-7, 0.1f, -2.0f, -7, -7, -7, std::numeric_limits<float>::infinity(), 3.0f, -7, -7}));
  file.at("h").read_floats(dst);
  EXPECT_EQ(out[1], 1.5f);
  EXPECT_EQ(out[6], 65504.0f);
  EXPECT_TRUE(std::isnan(out[7]));
  file.at("b").read_floats(dst);
  EXPECT_EQ(out[2], -0.25f);
  EXPECT_TRUE(std::isnan(out[7]));
  int64_t ids[2] = {1, 2};
  write_safetensors(path("i.safetensors"), std::vector<TensorToWrite>{{"i", View(ids, DType::i64, {2}), DType::i64}});
  EXPECT_THROW(SafetensorsFile::open(path("i.safetensors")).at("i").read_floats(View(out.data(), DType::f32, {2})),
               Error);
}

TEST(TensorConvert, EveryHalfIsConverted) {
  std::vector<uint16_t> half(1 << 16);
  std::vector<float> got(half.size());
  for (size_t i = 0; i < half.size(); i++) half[i] = static_cast<uint16_t>(i);
  to_float(half.data(), DType::f16, got.data(), static_cast<int64_t>(half.size()));
  for (size_t i = 0; i < half.size(); i++) {
    const float want = f16_to_float(half[i]);
    if (std::isnan(want)) ASSERT_TRUE(std::isnan(got[i])) << i;
    else ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(want)) << i;
  }
}

TEST_F(SafetensorsTest, ConversionsOfLargeTensorsAreExact) {
  // Larger than the thread grain and than the writer's buffer, with a length that divides neither.
  const int64_t n = (1 << 19) + 12345;
  std::vector<float> x(static_cast<size_t>(n)), y(x.size());
  for (int64_t i = 0; i < n; i++) x[static_cast<size_t>(i)] = f16_to_float(static_cast<uint16_t>(i % 0x7c00));
  write_safetensors(path("l.safetensors"),
                    std::vector<TensorToWrite>{{"x", View(x.data(), DType::f32, {n}), DType::f16}});
  SafetensorsFile::open(path("l.safetensors")).at("x").read_floats(View(y.data(), DType::f32, {n}));
  EXPECT_EQ(std::memcmp(x.data(), y.data(), x.size() * 4), 0);
}

TEST_F(SafetensorsTest, OverflowInF16LeavesTheOldFile) {
  float x[2] = {1.0f, 70000.0f};
  write_file(path("o.safetensors"), "old");
  EXPECT_THROW(
      write_safetensors(path("o.safetensors"), std::vector<TensorToWrite>{{"x", View(x, DType::f32, {2}), DType::f16}}),
      Error);
  EXPECT_EQ(read_file(path("o.safetensors")), "old");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir_), {}), 1);
  x[1] = INFINITY;  // an infinity stays one
  write_safetensors(path("o.safetensors"), std::vector<TensorToWrite>{{"x", View(x, DType::f32, {2}), DType::f16}});
}

TEST_F(SafetensorsTest, UnwritableFolderIsAnError) {
  float x[2] = {};
  write_file(path("file"), "");
  EXPECT_THROW(write_safetensors(path("file/x.safetensors"),
                                 std::vector<TensorToWrite>{{"x", View(x, DType::f32, {2}), DType::f32}}),
               Error);
}

TEST_F(SafetensorsTest, ShardedFolder) {
  float x[2] = {1, 2}, y[2] = {3, 4};
  const auto write = [&](const std::string& file, const std::string& name, float* data) {
    write_safetensors(path(file), std::vector<TensorToWrite>{{name, View(data, DType::f32, {2}), DType::f32}});
  };
  EXPECT_FALSE(SafetensorsFolder::present(dir_));
  EXPECT_THROW(SafetensorsFolder::open(dir_), Error);
  write("model-00001-of-00002.safetensors", "x", x);
  write("model-00002-of-00002.safetensors", "y", y);
  const std::string index = path("model.safetensors.index.json");
  write_file(index, R"({"metadata": {"total_size": 16}, "weight_map":
      {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})");
  EXPECT_TRUE(SafetensorsFolder::present(dir_));
  const auto folder = SafetensorsFolder::open(dir_);
  EXPECT_EQ(folder.at("y", {2}).view().f32()[1], 4.0f);
  EXPECT_EQ(folder.names(), (std::vector<std::string>{"x", "y"}));
  EXPECT_THROW(folder.at("z"), Error);

  const auto expect_error = [&](const std::string& text, const std::string& part) {
    write_file(index, text);
    try {
      SafetensorsFolder::open(dir_);
      ADD_FAILURE() << "no error for " << text;
    } catch (const Error& e) {
      EXPECT_HAS(e.what(), part);
    }
  };
  expect_error("{", "valid JSON");
  expect_error("{}", "weight_map");
  expect_error(R"({"weight_map": {"x": 1}})", "a file name");
  expect_error(R"({"weight_map": {"x": "../model-00001-of-00002.safetensors"}})", "same folder");
  expect_error(R"({"weight_map": {"x": "gone.safetensors"}})", "gone.safetensors");
  expect_error(R"({"weight_map": {"y": "model-00001-of-00002.safetensors"}})", "tensor \"y\"");
  write("model-00002-of-00002.safetensors", "x", y);
  expect_error(R"({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})",
               "tensor \"y\"");
  write_file(
      path("model-00002-of-00002.safetensors"),
      file_bytes(
          R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
          2));
  expect_error(R"({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})",
               "one shard only");
}

TEST_F(SafetensorsTest, ReadsTheOracleModels) {
  const std::string model = std::string(MM_SOURCE_DIR) + "/../shared/models/qwen3-8m";
  if (!dir_exists(model)) GTEST_SKIP() << "SKIPPED: no oracle data at " << model;
  const auto folder = SafetensorsFolder::open(model);
  int64_t params = 0;
  for (const TensorEntry* e : folder.entries()) params += e->numel();
  EXPECT_GE(params, 8328448);
  const TensorEntry& embed = folder.at("model.embed_tokens.weight", {6400, 256});
  EXPECT_EQ(embed.dtype(), DType::f16);
  std::vector<float> x(static_cast<size_t>(embed.numel()));
  embed.read_floats(View(x.data(), DType::f32, embed.shape()));
  double sum = 0;
  for (const float v : x) sum += std::abs(v);
  EXPECT_GT(sum, 1.0);
  EXPECT_LT(sum / static_cast<double>(x.size()), 1.0);
}

}  // namespace
}  // namespace mm
