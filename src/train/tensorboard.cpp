// Formula of the frame: u64 length | u32 mask(crc32c(length)) | bytes | u32 mask(crc32c(bytes)), little endian, with
// mask(c) = rotate_right(c, 15) + 0xa282ead8.
// Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; SessionLog session_log =
// 7; } Summary { repeated Value value = 1; }  Value { string tag = 1; float simple_value = 2; } SessionLog { Status
// status = 1; }  START = 1
#include "train/tensorboard.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>

#include "base/error.h"

namespace mm {

static constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0u);
    table[i] = c;
  }
  return table;
}

static uint32_t masked_crc32c(std::string_view bytes) {
  static constexpr auto table = make_crc_table();
  uint32_t c = ~0u;
  for (const char b : bytes) c = table[(c ^ static_cast<uint8_t>(b)) & 0xff] ^ (c >> 8);
  c = ~c;
  return std::rotr(c, 15) + 0xa282ead8u;
}

template <class T>
static void put_little_endian(std::string& out, T value) {
  for (size_t i = 0; i < sizeof(T); i++) out.push_back(static_cast<char>(value >> (8 * i)));
}

static void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

// Wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
static void put_key(std::string& out, uint32_t field, uint32_t wire) { put_varint(out, field << 3 | wire); }

static void put_bytes(std::string& out, uint32_t field, std::string_view bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out += bytes;
}

static void begin_event(std::string& event, double wall_time, int64_t step) {
  event.clear();
  put_key(event, 1, 1);
  put_little_endian(event, std::bit_cast<uint64_t>(wall_time));
  if (step != 0) {  // proto3 leaves defaults out
    put_key(event, 2, 0);
    put_varint(event, static_cast<uint64_t>(step));
  }
}

static std::string new_path(const std::string& dir, double wall_time) {
  static std::atomic<int> n_files{0};
  make_dirs(dir);
  char host[256] = "";
  if (gethostname(host, sizeof host - 1) != 0) host[0] = '\0';
  return path_join(dir, fmt::format("events.out.tfevents.{:010}.{}.{}.{}", static_cast<int64_t>(wall_time), host,
                                    getpid(), n_files++));
}

TensorBoardWriter::TensorBoardWriter(const std::string& dir, double wall_time, int64_t resume_step)
    : file_(new_path(dir, wall_time), /*must_be_new=*/true) {
  begin_event(event_, wall_time, 0);
  put_bytes(event_, 3, "brain.Event:2");
  write_record();
  if (resume_step >= 0) {
    begin_event(event_, wall_time, resume_step + 1);
    put_bytes(event_, 7, std::string_view("\x08\x01", 2));
    write_record();
  }
}

void TensorBoardWriter::add_scalars(int64_t step, double wall_time, std::span<const Scalar> scalars) {
  std::string summary, value;
  for (const auto& [tag, x] : scalars) {
    value.clear();
    put_bytes(value, 1, tag);
    put_key(value, 2, 5);
    put_little_endian(value, std::bit_cast<uint32_t>(static_cast<float>(x)));
    put_bytes(summary, 1, value);
  }
  begin_event(event_, wall_time, step);
  put_bytes(event_, 5, summary);
  write_record();
}

void TensorBoardWriter::write_record() {
  frame_.clear();
  put_little_endian(frame_, static_cast<uint64_t>(event_.size()));
  put_little_endian(frame_, masked_crc32c(std::string_view(frame_).substr(0, 8)));
  frame_ += event_;
  put_little_endian(frame_, masked_crc32c(event_));
  file_.write(frame_);
}

}  // namespace mm
