// The JSON header of a safetensors file, parsed without building a document: hostile headers cost no more than their
// size.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mm {

struct SafetensorsHeader {
  struct Tensor {
    std::string name, type_text;
    std::vector<int64_t> dims;
    uint64_t begin = 0, end = 0;  // bytes, relative to the data section
  };
  std::vector<Tensor> tensors;  // sorted by begin
  std::map<std::string, std::string> metadata;
};

// Parses and checks everything that can be checked against `data_bytes`, the size of the data section. Error with
// `where`.
SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t data_bytes, const std::string& where);

// Bytes an element of a type the format knows takes; 0 for an unknown type.
size_t safetensors_type_size(const std::string& type_text);

}  // namespace mm
