// Reads and writes the safetensors format: 8 bytes header length, a JSON header, then the tensors' bytes without gaps.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/view.h"

namespace mm {

// One tensor of a mapped file. Valid as long as its SafetensorsFile (or a copy of that) lives. Any thread.
struct TensorEntry {
  std::string name;
  std::string type_text;  // as the file says: "F16", "BF16", "U16", ...
  std::vector<int64_t> dims;
  const void* data = nullptr;  // maybe unaligned
  size_t bytes = 0;
  const std::string* file = nullptr;  // path, for messages

  std::string where() const;  // `model.safetensors: tensor "x"`
  // The three below throw an Error for element types that this program has no DType for (U16, F8_E4M3, ...) or, where a
  // Shape or View is asked for, more than Shape::max_dims dimensions.
  DType dtype() const;
  Shape shape() const;
  View view() const;  // zero copy, read only; Error if the file does not align the data to its type
  int64_t numel() const;
  // Converts to float; `dst` is f32, of this shape (MM_CHECK) with rows possibly strided. f32, f16, bf16, f64; no
  // alignment needed.
  void read_floats(const View& dst) const;
};

// One mapped file, fully validated when opened: header length, JSON, element types, shapes, offsets (in range, in
// agreement with shape and type, without gaps or overlaps), duplicates. Everything wrong is an Error naming file and
// tensor. Copies share the map.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path);
  static SafetensorsFile from_bytes(std::string bytes, const std::string& where);  // same checks on bytes in memory

  const std::string& path() const;
  const TensorEntry* find(std::string_view name) const;  // nullptr if absent
  // Errors say what was expected and found.
  const TensorEntry& at(std::string_view name) const;
  const TensorEntry& at(std::string_view name, const Shape& expected) const;
  const std::vector<TensorEntry>& entries() const;  // in the order of their data
  std::vector<std::string> names() const;
  const std::map<std::string, std::string>& metadata() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

// All weights of a model behind one find(): a .safetensors file, or an HF folder with model.safetensors or with
// model.safetensors.index.json and its shards.
class SafetensorsFolder {
 public:
  static SafetensorsFolder open(const std::string& path);
  static bool present(const std::string& path);  // whether open() would find something to read

  const std::string& path() const { return path_; }
  const TensorEntry* find(std::string_view name) const;
  const TensorEntry& at(std::string_view name) const;
  const TensorEntry& at(std::string_view name, const Shape& expected) const;
  std::vector<const TensorEntry*> entries() const;
  std::vector<std::string> names() const;
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  std::string path_;
  std::vector<SafetensorsFile> files_;
};

struct TensorToWrite {
  std::string name;
  View view;                 // rows possibly strided
  DType dtype = DType::f32;  // in the file: view.dtype (copied as it is), or f32, f16, bf16 converted from a float view
};

// Writes the file in one pass through a fixed 1 MiB buffer; complete or absent (AtomicFile). Adds {"format": "pt"} to
// the metadata unless given. Order in the file: by element size, largest first (keeps every tensor aligned), else as
// listed. Error when a finite value overflows f16. Names must be distinct (MM_CHECK).
void write_safetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                       std::map<std::string, std::string> metadata = {});

}  // namespace mm
