#include "formats/safetensors_header.h"

#include <algorithm>
#include <unordered_set>

#include "base/error.h"
#include "base/json.h"

namespace mm {

size_t safetensors_type_size(const std::string& t) {
  if (t == "F64" || t == "I64" || t == "U64") return 8;
  if (t == "F32" || t == "I32" || t == "U32") return 4;
  if (t == "F16" || t == "BF16" || t == "I16" || t == "U16") return 2;
  if (t == "I8" || t == "U8" || t == "BOOL" || t == "F8_E4M3" || t == "F8_E5M2" || t == "F8_E8M0") return 1;
  return 0;
}

namespace {

// Receives the parser's events. The header has exactly three levels, so any deeper nesting is an error at once.
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  HeaderReader(SafetensorsHeader& out, const std::string& where) : out_(out), where_(where) {}

  bool start_object(size_t) override {
    if (level_ == Level::outside) {
      level_ = Level::top;
    } else if (level_ == Level::top) {
      level_ = key_ == "__metadata__" ? Level::metadata : Level::tensor;
      if (level_ == Level::tensor) {
        tensor_ = {};
        tensor_.name = key_;
        seen_type_ = seen_shape_ = seen_offsets_ = false;
      }
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool key(std::string& k) override {
    if (level_ == Level::top) {
      if (!names_.insert(k).second) throw Error(where_, "distinct tensor names", fmt::format("\"{}\" twice", k));
    } else if (level_ == Level::metadata) {
      if (out_.metadata.contains(k)) throw Error(where_, "distinct metadata keys", fmt::format("\"{}\" twice", k));
    } else {
      bool* seen = k == "dtype"          ? &seen_type_
                   : k == "shape"        ? &seen_shape_
                   : k == "data_offsets" ? &seen_offsets_
                                         : nullptr;
      if (seen == nullptr) throw Error(here(), "fields dtype, shape and data_offsets", fmt::format("\"{}\"", k));
      if (*seen) throw Error(here(), "each field once", fmt::format("\"{}\" twice", k));
      *seen = true;
    }
    key_ = k;
    return true;
  }

  bool end_object() override {
    if (level_ == Level::tensor) {
      if (!seen_type_ || !seen_shape_ || !seen_offsets_)
        throw Error(here(), "fields dtype, shape and data_offsets", "one of them missing");
      out_.tensors.push_back(std::move(tensor_));
      level_ = Level::top;
    } else if (level_ == Level::metadata) {
      level_ = Level::top;
    } else {
      level_ = Level::outside;
    }
    return true;
  }

  bool start_array(size_t) override {
    if (level_ != Level::tensor || key_ == "dtype") unexpected("a list");
    level_ = key_ == "shape" ? Level::shape : Level::offsets;
    n_offsets_ = 0;
    return true;
  }

  bool end_array() override {
    if (level_ == Level::offsets && n_offsets_ != 2)
      throw Error(here(), "two data_offsets", fmt::format("{}", n_offsets_));
    level_ = Level::tensor;
    return true;
  }

  bool number_unsigned(number_unsigned_t v) override {
    if (level_ == Level::shape) {
      if (v > static_cast<uint64_t>(INT64_MAX)) throw Error(here(), "dimensions below 2^63", std::to_string(v));
      tensor_.dims.push_back(static_cast<int64_t>(v));
    } else if (level_ == Level::offsets) {
      if (n_offsets_ < 2) (n_offsets_ == 0 ? tensor_.begin : tensor_.end) = v;
      n_offsets_++;
    } else {
      unexpected("a number");
    }
    return true;
  }

  bool string(string_t& v) override {
    if (level_ == Level::metadata) {
      out_.metadata[key_] = v;
    } else if (level_ == Level::tensor && key_ == "dtype") {
      tensor_.type_text = v;
    } else {
      unexpected("a string");
    }
    return true;
  }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("true or false"); }
  bool number_integer(number_integer_t v) override { return unexpected(fmt::format("the negative number {}", v)); }
  bool number_float(number_float_t, const string_t& s) override { return unexpected(fmt::format("the number {}", s)); }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& e) override {
    throw Error(where_, "a JSON header", e.what(), "the file is damaged or not a safetensors file");
  }

 private:
  enum class Level { outside, top, metadata, tensor, shape, offsets };

  std::string here() const {
    return level_ == Level::outside || level_ == Level::top ? where_
           : level_ == Level::metadata                      ? where_ + ": __metadata__"
                                                            : fmt::format("{}: tensor \"{}\"", where_, tensor_.name);
  }
  [[noreturn]] bool unexpected(const std::string& found) const {
    const char* expected = level_ == Level::outside    ? "an object as header"
                           : level_ == Level::top      ? "an object for every tensor"
                           : level_ == Level::metadata ? "strings only"
                           : level_ == Level::shape    ? "a shape of whole numbers"
                           : level_ == Level::offsets  ? "data_offsets that are whole numbers"
                           : key_ == "dtype"           ? "a string as dtype"
                                                       : "a list as shape and data_offsets";
    throw Error(here(), expected, found);
  }

  SafetensorsHeader& out_;
  const std::string& where_;
  Level level_ = Level::outside;
  std::string key_;
  SafetensorsHeader::Tensor tensor_;
  bool seen_type_ = false, seen_shape_ = false, seen_offsets_ = false;
  int n_offsets_ = 0;
  std::unordered_set<std::string> names_;
};

uint64_t checked_bytes(const SafetensorsHeader::Tensor& t, const std::string& here) {
  const size_t size = safetensors_type_size(t.type_text);
  if (size == 0) throw Error(here, "a known dtype (F32, F16, BF16, ...)", fmt::format("\"{}\"", t.type_text));
  // Zero dimensions count as one here: the row length of an empty tensor must not overflow either.
  int64_t bytes = static_cast<int64_t>(size);
  bool empty = false;
  for (const int64_t d : t.dims) {
    empty = empty || d == 0;
    if (__builtin_mul_overflow(bytes, d == 0 ? 1 : d, &bytes))
      throw Error(here, "a shape of less than 2^63 bytes", fmt::format("[{}]", fmt::join(t.dims, ", ")));
  }
  return empty ? 0 : static_cast<uint64_t>(bytes);
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t data_bytes, const std::string& where) {
  SafetensorsHeader header;
  if (text.empty() || text[0] != '{')
    throw Error(where, "a header that begins with {", "something else", "is it a safetensors file?");
  HeaderReader reader(header, where);
  json::sax_parse(text.begin(), text.end(), &reader);

  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const auto& a, const auto& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  uint64_t position = 0;
  for (const auto& t : header.tensors) {
    const std::string here = fmt::format("{}: tensor \"{}\"", where, t.name);
    if (t.end < t.begin || t.end > data_bytes) {
      throw Error(here, fmt::format("data_offsets within {} bytes", data_bytes),
                  fmt::format("[{}, {}]", t.begin, t.end), "the file is truncated or damaged");
    }
    const uint64_t bytes = checked_bytes(t, here);
    if (t.end - t.begin != bytes) {
      throw Error(here, fmt::format("{} bytes for {} [{}]", bytes, t.type_text, fmt::join(t.dims, ", ")),
                  fmt::format("data_offsets of {} bytes", t.end - t.begin));
    }
    if (t.begin != position) {
      throw Error(here, fmt::format("data from byte {} on", position), fmt::format("byte {}", t.begin),
                  t.begin < position ? "tensors must not overlap" : "there must be no gaps");
    }
    position = t.end;
  }
  if (position != data_bytes) {
    throw Error(where, fmt::format("{} bytes of tensors", position), fmt::format("{}", data_bytes),
                "the file is damaged");
  }
  return header;
}

}  // namespace mm
