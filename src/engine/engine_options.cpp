#include "engine/engine_options.h"

#include "base/error.h"

namespace mm {

namespace {

template <class T>
struct Named {
  const char* name;
  T value;
  const char* where = "";  // not everywhere
};
constexpr Named<KvLayout> layouts[] = {
    {"paged", KvLayout::paged}, {"preallocated", KvLayout::preallocated}, {"concat", KvLayout::concat}};
constexpr Named<KvFormat> kv_formats[] = {
    {"f32", KvFormat::f32}, {"bf16", KvFormat::bf16}, {"f16", KvFormat::f16}, {"i8", KvFormat::i8}};
constexpr Named<WeightFormat> weight_formats[] = {{"f32", WeightFormat::f32},
                                                  {"bf16", WeightFormat::bf16},
                                                  {"i8", WeightFormat::i8},
                                                  {"f16", WeightFormat::f16, " (GPU)"}};

template <class T, size_t n>
T from_name(const Named<T> (&table)[n], const char* flag, const std::string& name) {
  std::string all;
  for (const auto& entry : table) {
    if (name == entry.name) return entry.value;
    all += (all.empty() ? "" : ", ") + std::string(entry.name) + entry.where;
  }
  throw Error(flag, "one of " + all, "\"" + name + "\"");
}

template <class T, size_t n>
const char* name_of(const Named<T> (&table)[n], T value) {
  for (const auto& entry : table)
    if (entry.value == value) return entry.name;
  MM_CHECK(false);
  return "";
}

}  // namespace

KvLayout kv_layout_from_name(const std::string& name, const char* flag) { return from_name(layouts, flag, name); }
KvFormat kv_format_from_name(const std::string& name, const char* flag) { return from_name(kv_formats, flag, name); }
WeightFormat weight_format_from_name(const std::string& name, const char* flag) {
  return from_name(weight_formats, flag, name);
}
const char* weight_format_name(WeightFormat format) { return name_of(weight_formats, format); }
const char* kv_format_name(KvFormat format) { return name_of(kv_formats, format); }
const char* kv_layout_name(KvLayout layout) { return name_of(layouts, layout); }

size_t kv_element_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::f32: return 4;
    case KvFormat::bf16:
    case KvFormat::f16: return 2;
    case KvFormat::i8: return 1;
  }
  MM_CHECK(false);
  return 0;
}

}  // namespace mm
