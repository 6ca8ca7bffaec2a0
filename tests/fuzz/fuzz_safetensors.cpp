// Hostile safetensors files: every input is either read or an Error; every accepted tensor lies inside the file.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "formats/safetensors.h"

static void touch(const mm::TensorEntry& entry) {
  unsigned sum = 0;
  for (size_t i = 0; i < entry.bytes; i++) sum += static_cast<const unsigned char*>(entry.data)[i];
  const volatile unsigned sink = sum;  // the reads must happen
  (void)sink;
  std::vector<float> values(static_cast<size_t>(entry.numel()));
  entry.read_floats(mm::View(values.data(), mm::DType::f32, entry.shape()));
  (void)entry.view();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto file = mm::SafetensorsFile::from_bytes(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
    for (const auto& entry : file.entries()) {
      if (file.find(entry.name) != &entry) std::abort();
      try {
        touch(entry);
      } catch (const mm::Error&) {  // unsupported type, too many dimensions, unaligned
      }
    }
  } catch (const mm::Error&) {
  }
  return 0;
}
