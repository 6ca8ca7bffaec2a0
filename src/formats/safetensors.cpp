#include "formats/safetensors.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "formats/safetensors_header.h"
#include "formats/tensor_convert.h"

namespace mm {

// The limit of the reference implementation.
constexpr uint64_t max_header_bytes = 100'000'000;

static const std::pair<const char*, DType> type_names[] = {
    {"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}, {"F64", DType::f64}, {"I64", DType::i64},
    {"I32", DType::i32}, {"I16", DType::i16}, {"I8", DType::i8},     {"U8", DType::u8},   {"BOOL", DType::boolean}};

static std::string dims_text(const std::vector<int64_t>& dims) { return fmt::format("[{}]", fmt::join(dims, ", ")); }

std::string TensorEntry::where() const { return fmt::format("{}: tensor \"{}\"", *file, name); }

DType TensorEntry::dtype() const {
  for (const auto& [text, type] : type_names) {
    if (type_text == text) return type;
  }
  throw Error(where(), "a dtype this program reads (F32, F16, BF16, F64, I64, I32, I16, I8, U8, BOOL)", type_text,
              "convert the file");
}

Shape TensorEntry::shape() const {
  if (dims.size() > Shape::max_dims) {
    throw Error(where(), fmt::format("at most {} dimensions", Shape::max_dims), dims_text(dims));
  }
  Shape s;
  for (const int64_t d : dims) s.dim[static_cast<size_t>(s.ndim++)] = d;
  return s;
}

int64_t TensorEntry::numel() const { return static_cast<int64_t>(bytes / safetensors_type_size(type_text)); }

View TensorEntry::view() const {
  const DType t = dtype();
  const Shape s = shape();
  if (reinterpret_cast<uintptr_t>(data) % dtype_size(t) != 0) {
    throw Error(where(), fmt::format("data aligned to {} bytes", dtype_size(t)), "unaligned data",
                "save the file again with a current safetensors version");
  }
  return View(const_cast<void*>(data), t, s);
}

void TensorEntry::read_floats(const View& dst) const {
  if (!is_float_dtype(dtype())) throw Error(where(), "F32, F16, BF16 or F64", type_text);
  MM_CHECK(shape() == dst.shape, "{} into {}", where(), dst.shape.str());
  copy_to_float(View(const_cast<void*>(data), dtype(), shape()), dst);
}

struct SafetensorsFile::Impl {
  std::string path;
  MappedFile map;
  std::string owned;  // instead of the map, for bytes in memory
  std::vector<TensorEntry> entries;
  std::unordered_map<std::string_view, size_t> index;
  std::map<std::string, std::string> metadata;

  void parse(std::string_view bytes) {
    if (bytes.size() < 8) {
      throw Error(path, "at least 8 bytes", fmt::format("{}", bytes.size()),
                  "the file is truncated or not safetensors");
    }
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | static_cast<unsigned char>(bytes[static_cast<size_t>(i)]);
    if (n > max_header_bytes) {
      throw Error(path, fmt::format("a header of at most {} bytes", max_header_bytes), fmt::format("{}", n),
                  "is it a safetensors file?");
    }
    if (n > bytes.size() - 8) {
      throw Error(path, fmt::format("a header of {} bytes", n), fmt::format("{} bytes left", bytes.size() - 8),
                  "the file is truncated");
    }
    const std::string_view data = bytes.substr(8 + n);
    SafetensorsHeader header = parse_safetensors_header(bytes.substr(8, n), data.size(), path);
    metadata = std::move(header.metadata);
    entries.reserve(header.tensors.size());
    for (auto& t : header.tensors) {
      entries.push_back({std::move(t.name), std::move(t.type_text), std::move(t.dims), data.data() + t.begin,
                         static_cast<size_t>(t.end - t.begin), &path});
    }
    for (size_t i = 0; i < entries.size(); i++) index[entries[i].name] = i;
  }
};

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  auto impl = std::make_shared<Impl>();
  impl->path = path;
  impl->map = MappedFile(path);
  impl->parse(impl->map.text());
  SafetensorsFile f;
  f.impl_ = std::move(impl);
  return f;
}

SafetensorsFile SafetensorsFile::from_bytes(std::string bytes, const std::string& where) {
  auto impl = std::make_shared<Impl>();
  impl->path = where;
  impl->owned = std::move(bytes);
  impl->parse(impl->owned);
  SafetensorsFile f;
  f.impl_ = std::move(impl);
  return f;
}

const std::string& SafetensorsFile::path() const { return impl_->path; }
const std::vector<TensorEntry>& SafetensorsFile::entries() const { return impl_->entries; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return impl_->metadata; }

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = impl_->index.find(name);
  return it == impl_->index.end() ? nullptr : &impl_->entries[it->second];
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> out;
  for (const auto& e : impl_->entries) out.push_back(e.name);
  return out;
}

static const TensorEntry& require(const TensorEntry* entry, std::string_view name, const std::string& path) {
  if (entry == nullptr) {
    throw Error(path, fmt::format("tensor \"{}\"", name), "none of that name",
                "does the config belong to these weights?");
  }
  return *entry;
}

static const TensorEntry& require_shape(const TensorEntry& entry, const Shape& expected) {
  if (entry.shape() != expected) {
    throw Error(entry.where(), fmt::format("shape {}", expected.str()), dims_text(entry.dims),
                "does the config belong to these weights?");
  }
  return entry;
}

const TensorEntry& SafetensorsFile::at(std::string_view name) const { return require(find(name), name, path()); }
const TensorEntry& SafetensorsFile::at(std::string_view name, const Shape& expected) const {
  return require_shape(at(name), expected);
}

// ---- folders ----

static const char* const single_name = "model.safetensors";
static const char* const index_name = "model.safetensors.index.json";

bool SafetensorsFolder::present(const std::string& path) {
  if (!dir_exists(path)) return file_exists(path);
  return file_exists(path_join(path, single_name)) || file_exists(path_join(path, index_name));
}

// tensor name -> shard. std::map underneath: indices of large models hold ten thousands of names.
static std::map<std::string, std::string> load_index(const std::string& path) {
  json index;
  try {
    index = json::parse(read_file(path));
  } catch (const json::exception& e) {
    throw Error(path, "valid JSON in UTF-8", e.what());
  }
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    throw Error(path, "an object \"weight_map\" from tensor to file", "none");
  }
  std::map<std::string, std::string> out;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (!shard.is_string()) throw Error(fmt::format("{}: \"{}\"", path, name), "a file name", json_type_name(shard));
    const std::string file = shard.get<std::string>();
    if (file.empty() || file == ".." || file.find('/') != std::string::npos) {
      throw Error(fmt::format("{}: \"{}\"", path, name), "the name of a file in the same folder", file);
    }
    out[name] = file;
  }
  return out;
}

SafetensorsFolder SafetensorsFolder::open(const std::string& path) {
  SafetensorsFolder out;
  out.path_ = path;
  if (!dir_exists(path)) {
    out.files_.push_back(SafetensorsFile::open(path));
    return out;
  }
  if (file_exists(path_join(path, single_name))) {
    out.files_.push_back(SafetensorsFile::open(path_join(path, single_name)));
    return out;
  }
  const std::string index_path = path_join(path, index_name);
  if (!file_exists(index_path)) {
    throw Error(path, fmt::format("{} or {}", single_name, index_name), "neither", "name the folder of a saved model");
  }
  const auto weight_map = load_index(index_path);
  std::map<std::string, size_t> shard_number;
  for (const auto& [name, shard] : weight_map) {
    if (shard_number.try_emplace(shard, out.files_.size()).second) {
      out.files_.push_back(SafetensorsFile::open(path_join(path, shard)));
    }
  }
  for (const auto& [name, shard] : weight_map) {
    if (out.files_[shard_number[shard]].find(name) == nullptr) {
      throw Error(path_join(path, shard), fmt::format("tensor \"{}\", as {} says", name, index_name),
                  "none of that name");
    }
  }
  std::unordered_set<std::string_view> seen;
  for (const auto& file : out.files_) {
    for (const auto& entry : file.entries()) {
      if (!seen.insert(entry.name).second) throw Error(entry.where(), "each tensor in one shard only", "it in two");
    }
  }
  return out;
}

const TensorEntry* SafetensorsFolder::find(std::string_view name) const {
  for (const auto& file : files_) {
    if (const TensorEntry* e = file.find(name)) return e;
  }
  return nullptr;
}

const TensorEntry& SafetensorsFolder::at(std::string_view name) const { return require(find(name), name, path_); }
const TensorEntry& SafetensorsFolder::at(std::string_view name, const Shape& expected) const {
  return require_shape(at(name), expected);
}

std::vector<const TensorEntry*> SafetensorsFolder::entries() const {
  std::vector<const TensorEntry*> out;
  for (const auto& file : files_) {
    for (const auto& entry : file.entries()) out.push_back(&entry);
  }
  return out;
}

std::vector<std::string> SafetensorsFolder::names() const {
  std::vector<std::string> out;
  for (const TensorEntry* e : entries()) out.push_back(e->name);
  return out;
}

// ---- writing ----

static const char* type_text(DType t) {
  for (const auto& [text, type] : type_names) {
    if (type == t) return text;
  }
  MM_CHECK(false, "dtype {}", static_cast<int>(t));
  return "";
}

static std::string build_header(const std::vector<const TensorToWrite*>& order,
                                const std::map<std::string, std::string>& metadata) {
  // Built as text: ordered_json looks every key up in a list, quadratic in the number of tensors.
  std::string text = "{\"__metadata__\":" + json(metadata).dump();
  uint64_t offset = 0;
  for (const TensorToWrite* t : order) {
    const Shape& s = t->view.shape;
    const uint64_t bytes = static_cast<uint64_t>(t->view.numel()) * dtype_size(t->dtype);
    text +=
        fmt::format(",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}", json(t->name).dump(),
                    type_text(t->dtype), fmt::join(s.dim.begin(), s.dim.begin() + s.ndim, ","), offset, offset + bytes);
    offset += bytes;
  }
  text += "}";
  while (text.size() % 8 != 0) text += ' ';
  return text;
}

// Writes one tensor through a buffer; rows are cut into pieces that fit it.
static void write_tensor(AtomicFile& file, const TensorToWrite& t, const std::string& path, std::vector<float>& floats,
                         std::vector<char>& bytes) {
  const View& v = t.view;
  const bool native = v.dtype == t.dtype;
  const size_t in_size = dtype_size(v.dtype);
  if (v.numel() == 0) return;
  const int64_t rows = v.contiguous() ? 1 : v.rows(), cols = v.contiguous() ? v.numel() : v.cols();
  const int64_t step = static_cast<int64_t>(floats.size());
  for (int64_t r = 0; r < rows; r++) {
    const char* row = static_cast<const char*>(v.data) + static_cast<size_t>(r * v.ld) * in_size;
    if (native) {
      file.write(row, static_cast<size_t>(cols) * in_size);
      continue;
    }
    for (int64_t c = 0; c < cols; c += step) {
      const int64_t n = std::min(step, cols - c);
      to_float(row + static_cast<size_t>(c) * in_size, v.dtype, floats.data(), n);
      const int64_t bad = from_float(floats.data(), bytes.data(), t.dtype, n);
      if (bad >= 0) {
        throw Error(fmt::format("{}: tensor \"{}\"", path, t.name), "values below 65520 for f16",
                    fmt::format("{}", floats[static_cast<size_t>(bad)]), "save as bf16 or f32");
      }
      file.write(bytes.data(), static_cast<size_t>(n) * dtype_size(t.dtype));
    }
  }
}

void write_safetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                       std::map<std::string, std::string> metadata) {
  metadata.try_emplace("format", "pt");
  std::unordered_set<std::string_view> names;
  std::vector<const TensorToWrite*> order;
  for (const TensorToWrite& t : tensors) {
    MM_CHECK(t.name != "__metadata__" && names.insert(t.name).second, "tensor name \"{}\"", t.name);
    MM_CHECK(t.view.dtype == t.dtype || is_float_dtype(t.view.dtype), "{} is {}", t.name, dtype_name(t.view.dtype));
    order.push_back(&t);
  }
  std::stable_sort(order.begin(), order.end(), [](const TensorToWrite* a, const TensorToWrite* b) {
    return dtype_size(a->dtype) > dtype_size(b->dtype);
  });
  const std::string header = build_header(order, metadata);
  AtomicFile file(path);
  char length[8];
  for (size_t i = 0; i < 8; i++) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  file.write(length, sizeof length);
  file.write(header);
  std::vector<float> floats(1 << 18);
  std::vector<char> bytes(floats.size() * sizeof(float));
  for (const TensorToWrite* t : order) write_tensor(file, *t, path, floats, bytes);
  file.commit();
}

}  // namespace mm
