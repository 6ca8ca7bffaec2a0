#include "grammar/json_schema.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "grammar/json_nodes.h"
#include "grammar/number_range.h"
#include "grammar/regex.h"
#include "grammar/schema_merge.h"
#include "grammar/string_formats.h"

namespace mm::grammar {

namespace {

constexpr int kMaxJsonDepth = 200;      // of the schema's text
constexpr int kMaxSchemaDepth = 200;    // schemas inside schemas, references followed
constexpr size_t kMaxValues = 100'000;  // JSON values in a schema, and in what merging made of it
constexpr size_t kMaxNameBytes = 512;   // of a property
constexpr int32_t kMaxPrefixItems = 1000;

enum Type : unsigned { null_type = 1, boolean = 2, string = 4, integer = 8, number = 16, array = 32, object = 64 };
struct TypeName {
  const char* name;
  unsigned type;
};
constexpr TypeName kTypes[] = {{"null", null_type}, {"boolean", boolean}, {"string", string}, {"integer", integer},
                               {"number", number},  {"array", array},     {"object", object}};

// Keywords that say something, and the type that they are about (0: any).
struct Keyword {
  const char* name;
  unsigned type;
};
constexpr Keyword kKeywords[] = {
    {"type", 0},
    {"enum", 0},
    {"const", 0},
    {"anyOf", 0},
    {"oneOf", 0},
    {"allOf", 0},
    {"$ref", 0},
    {"properties", object},
    {"required", object},
    {"additionalProperties", object},
    {"items", array},
    {"prefixItems", array},
    {"minItems", array},
    {"maxItems", array},
    {"uniqueItems", array},
    {"pattern", string},
    {"format", string},
    {"minLength", string},
    {"maxLength", string},
    {"minimum", number},
    {"maximum", number},
    {"exclusiveMinimum", number},
    {"exclusiveMaximum", number},
};

const Keyword* find_keyword(std::string_view name) {
  const auto it =
      std::find_if(std::begin(kKeywords), std::end(kKeywords), [&](const Keyword& k) { return k.name == name; });
  return it == std::end(kKeywords) ? nullptr : it;
}

const ordered_json* find(const ordered_json& schema, const std::string& key) {
  const auto it = schema.find(key);
  return it == schema.end() ? nullptr : &*it;
}

size_t count_values(const ordered_json& value, const std::string& where, int depth = 0) {
  if (depth > kMaxJsonDepth)
    throw Error(where, fmt::format("a schema nested at most {} deep", kMaxJsonDepth), "deeper nesting");
  size_t n = 1;
  if (value.is_structured())
    for (const auto& part : value) n += count_values(part, where, depth + 1);
  return n;
}

bool says_nothing(const ordered_json& schema) {
  for (const auto& [name, value] : schema.items())
    if (!is_annotation(name) && name != "$id") return false;
  return true;
}

// The integer next to a bound, upwards (1: a lower bound) or downwards (-1); beyond kLargestInteger by one at most.
int64_t first_integer(const Bound& bound, int direction) {
  const int sign = bound.negative ? -1 : 1;
  if (bound.whole.size() > kMaxIntegerDigits) return sign * (sign == direction ? kLargestInteger + 1 : kLargestInteger);
  const int64_t toward_zero = sign * std::stoll(bound.whole);
  if (!bound.fraction.empty()) return sign == direction ? toward_zero + direction : toward_zero;
  return bound.exclusive ? toward_zero + direction : toward_zero;
}

class SchemaCompiler {
 public:
  SchemaCompiler(const ordered_json& root, const std::string& where)
      : root_(root), where_(where), b_(where), json_(b_) {}

  Graph compile() {
    account(root_);
    return b_.finish(node_of(root_, where_));
  }

 private:
  struct Depth {
    Depth(int& depth, const std::string& path) : depth_(depth) {
      if (++depth_ > kMaxSchemaDepth) {
        depth_--;
        throw Error(path, fmt::format("schemas at most {} inside each other", kMaxSchemaDepth),
                    "more, or one inside itself");
      }
    }
    ~Depth() { depth_--; }
    Depth(const Depth&) = delete;
    int& depth_;
  };

  void account(const ordered_json& schema) {
    values_ += count_values(schema, where_);
    if (values_ > kMaxValues)
      throw Error(where_, fmt::format("a schema of at most {} values, allOf and anyOf combined", kMaxValues),
                  "a larger one");
  }

  // Schemas made by merging live as long as the compiler: nodes are remembered by address.
  const ordered_json& keep(ordered_json schema) {
    account(schema);
    return made_.emplace_back(std::move(schema));
  }

  NodeId node_of(const ordered_json& schema, const std::string& path) {
    if (schema.is_boolean()) return schema.get<bool>() ? json_.any_value() : kNever;
    const auto it = known_.find(&schema);
    if (it != known_.end()) return it->second;
    const Depth depth(depth_, path);
    const NodeId jump = known_[&schema] = b_.jump(path);
    b_.set_jump(jump, build(schema, path));
    return jump;
  }

  void check_keywords(const ordered_json& schema, const std::string& path) const {
    if (!schema.is_object()) throw Error(path, "a schema (an object, true or false)", json_type_name(schema));
    for (const auto& [name, value] : schema.items()) {
      if (is_annotation(name) || find_keyword(name) != nullptr) continue;
      if (name == "$id" && &schema == &root_) continue;
      throw Error(child_path(path, name), "a keyword that is enforced", "one that is not supported",
                  "remove it; docs/STRUCTURED_OUTPUT.md lists what is supported");
    }
  }

  NodeId build(const ordered_json& schema, const std::string& path) {
    check_keywords(schema, path);
    b_.spend(10);
    if (const auto* ref = find(schema, "$ref"); ref != nullptr) {
      ordered_json beside = schema;
      beside.erase("$ref");
      if (says_nothing(beside)) {
        const auto [target, target_path] = resolve(*ref, child_path(path, "$ref"));
        return node_of(*target, target_path);
      }
    }
    if (schema.contains("$ref") || schema.contains("allOf")) return node_of(keep(flat(schema, path)), path);
    for (const char* keyword : {"anyOf", "oneOf"})
      if (schema.contains(keyword)) return one_of(schema, keyword, path);
    if (schema.contains("enum") || schema.contains("const")) return enumeration(schema, path);
    if (says_nothing(schema)) return json_.any_value();
    const unsigned types = types_of(schema, path);
    std::vector<NodeId> choices;
    if (types & null_type) choices.push_back(b_.literal("null"));
    if (types & boolean) choices.push_back(b_.alt({b_.literal("true"), b_.literal("false")}));
    if (types & string) choices.push_back(string_node(schema, path));
    if (types & number) choices.push_back(number_of(schema, path));
    else if (types & integer) choices.push_back(integer_of(schema, path));
    if (types & array) choices.push_back(array_node(schema, path));
    if (types & object) choices.push_back(object_node(schema, path));
    return b_.alt(choices);
  }

  std::pair<const ordered_json*, std::string> resolve(const ordered_json& ref, const std::string& path) const {
    if (!ref.is_string()) throw Error(path, "a string", json_type_name(ref));
    const auto& text = ref.get_ref<const std::string&>();
    if (text != "#" && !text.starts_with("#/"))
      throw Error(path, "a reference into this schema, \"#\" or \"#/$defs/name\"", child_path("", text).substr(1));
    const ordered_json* at = &root_;
    std::string at_path = where_;
    for (size_t begin = 1; begin < text.size();) {
      const size_t end = std::min(text.find('/', begin + 1), text.size());
      std::string name = text.substr(begin + 1, end - begin - 1);
      for (const auto& [code, c] : {std::pair("~1", "/"), std::pair("~0", "~")})
        for (size_t i = 0; (i = name.find(code, i)) != std::string::npos; i++) name.replace(i, 2, c);
      const ordered_json* next = nullptr;
      if (at->is_object()) {
        next = find(*at, name);
      } else if (at->is_array() && !name.empty() && name.size() < 7 &&
                 name.find_first_not_of("0123456789") == std::string::npos) {
        const size_t index = std::stoul(name);
        if (index < at->size()) next = &(*at)[index];
      }
      if (next == nullptr)
        throw Error(path, "a reference to a part of the schema", "nothing at " + child_path(at_path, name));
      at = next;
      at_path = child_path(at_path, name);
      begin = end;
    }
    return {at, at_path};
  }

  // The schema without $ref and allOf at its top, merged with what they stand for.
  ordered_json flat(const ordered_json& schema, const std::string& path) {
    if (schema.is_boolean()) return schema;
    check_keywords(schema, path);
    const Depth depth(depth_, path);
    ordered_json out = ordered_json::object();
    for (const auto& [name, value] : schema.items())
      if (name != "$ref" && name != "allOf" && name != "$id" && !is_annotation(name)) out[name] = value;
    if (const auto* ref = find(schema, "$ref"); ref != nullptr) {
      const auto [target, target_path] = resolve(*ref, child_path(path, "$ref"));
      out = merge_schemas(flat(*target, target_path), out, path);
    }
    if (const auto* all = find(schema, "allOf"); all != nullptr) {
      const std::string all_path = child_path(path, "allOf");
      for (size_t i = 0; i < list_of(*all, all_path).size(); i++)
        out = merge_schemas(out, flat((*all)[i], child_path(all_path, std::to_string(i))), path);
    }
    account(out);
    return out;
  }

  static const ordered_json& list_of(const ordered_json& value, const std::string& path) {
    if (!value.is_array() || value.empty()) throw Error(path, "a list that is not empty", json_type_name(value));
    return value;
  }

  NodeId one_of(const ordered_json& schema, const char* keyword, const std::string& path) {
    ordered_json base = schema;
    base.erase(keyword);
    const std::string list_path = child_path(path, keyword);
    const ordered_json& branches = list_of(schema[keyword], list_path);
    const bool alone = says_nothing(base);
    if (!alone) base = flat(base, path);
    std::vector<NodeId> choices;
    for (size_t i = 0; i < branches.size(); i++) {
      const std::string branch_path = child_path(list_path, std::to_string(i));
      if (alone) choices.push_back(node_of(branches[i], branch_path));
      else
        choices.push_back(node_of(keep(merge_schemas(base, flat(branches[i], branch_path), branch_path)), branch_path));
    }
    return b_.alt(choices);
  }

  NodeId enumeration(const ordered_json& schema, const std::string& path) {
    for (const auto& [name, value] : schema.items())
      if (name != "enum" && name != "const" && name != "type" && !is_annotation(name))
        throw Error(child_path(path, name), "only \"type\" beside enum and const", "\"" + name + "\"",
                    "leave out the values that it excludes");
    const auto* only = find(schema, "const");
    const auto* list = find(schema, "enum");
    const unsigned types = schema.contains("type") ? types_of(schema, path) : ~0u;
    std::vector<const ordered_json*> values;
    const auto add = [&](const ordered_json& value) {
      const bool whole = value.is_number_integer() ||
                         (value.is_number_float() && value.get<double>() == std::floor(value.get<double>()));
      const unsigned type = value.is_null()      ? null_type
                            : value.is_boolean() ? boolean
                            : value.is_string()  ? string
                            : value.is_array()   ? array
                            : value.is_object()  ? object
                            : whole              ? integer | number
                                                 : number;
      if ((types & type) != 0 && (only == nullptr || value == *only)) values.push_back(&value);
    };
    if (list != nullptr)
      for (const auto& value : list_of(*list, child_path(path, "enum"))) add(value);
    else add(*only);
    return json_.one_of(values);
  }

  static unsigned types_of(const ordered_json& schema, const std::string& path) {
    unsigned types = 0;
    const auto* given = find(schema, "type");
    if (given == nullptr) {  // the types that the keywords are about
      for (const auto& [name, value] : schema.items())
        if (const Keyword* keyword = find_keyword(name); keyword != nullptr) types |= keyword->type;
      return types == 0 ? ~0u : types;
    }
    const std::string type_path = child_path(path, "type");
    const auto add = [&](const ordered_json& name) {
      for (const auto& [known, type] : kTypes)
        if (name == known) return void(types |= type);
      throw Error(type_path, "null, boolean, string, integer, number, array or object",
                  name.dump(-1, ' ', true, ordered_json::error_handler_t::replace).substr(0, 60));
    };
    if (given->is_array()) std::for_each(given->begin(), given->end(), add);
    else add(*given);
    return types;
  }

  // A keyword that counts: >= 0, or `fallback` where it is missing.
  static int32_t count_of(const ordered_json& schema, const char* keyword, int32_t fallback, const std::string& path) {
    const auto* value = find(schema, keyword);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer() || (!value->is_number_unsigned() && value->get<int64_t>() < 0))
      throw Error(child_path(path, keyword), "a whole number >= 0", json_type_name(*value));
    return static_cast<int32_t>(std::min<uint64_t>(value->get<uint64_t>(), kUnbounded));
  }

  NodeId string_node(const ordered_json& schema, const std::string& path) {
    const int32_t min = count_of(schema, "minLength", 0, path), max = count_of(schema, "maxLength", kUnbounded, path);
    if (min > max) return kNever;
    std::vector<Regex> all;
    size_t patterns = 0;  // their length
    if (const auto* pattern = find(schema, "pattern"); pattern != nullptr) {
      const std::string pattern_path = child_path(path, "pattern");
      if (!pattern->is_string()) throw Error(pattern_path, "a string", json_type_name(*pattern));
      patterns += pattern->get_ref<const std::string&>().size();
      all.push_back(parse_regex(pattern->get_ref<const std::string&>(), RegexMatch::search, pattern_path));
    }
    if (const auto* format = find(schema, "format"); format != nullptr) {
      const std::string format_path = child_path(path, "format");
      if (!format->is_string()) throw Error(format_path, "a string", json_type_name(*format));
      const auto& name = format->get_ref<const std::string&>();
      if (format_pattern(name).empty())
        throw Error(format_path, std::string(kFormats), child_path("", name).substr(1),
                    "remove it, or write a pattern");
      patterns += format_pattern(name).size();
      all.push_back(parse_regex(format_pattern(name), RegexMatch::whole, format_path));
    }
    if (all.empty()) return json_.any_string(min, max);
    b_.spend(2 * patterns);
    if (all.size() == 1 && min == 0 && max == kUnbounded) return json_.string(regex_node(json_.chars(), all[0]));
    const char* last = schema.contains("pattern") ? "pattern" : "format";
    return json_.string(intersection_node(json_.chars(), all, min, max, child_path(path, last)));
  }

  // The tighter of minimum and exclusiveMinimum, or of the maxima.
  static std::optional<Bound> bound_of(const ordered_json& schema, const char* inclusive, const char* exclusive,
                                       int tighter, const std::string& path) {
    std::optional<Bound> out;
    for (const char* keyword : {inclusive, exclusive}) {
      const auto* value = find(schema, keyword);
      if (value == nullptr) continue;
      if (!value->is_number() || !std::isfinite(value->get<double>()))
        throw Error(child_path(path, keyword), "a number", json_type_name(*value));
      const Bound bound = parse_bound(value->dump(), keyword == exclusive);
      const int order = out ? compare_bounds(bound, *out) : tighter;
      if (order == tighter || (order == 0 && bound.exclusive)) out = bound;
    }
    return out;
  }
  static std::optional<Bound> low_bound(const ordered_json& schema, const std::string& path) {
    return bound_of(schema, "minimum", "exclusiveMinimum", 1, path);
  }
  static std::optional<Bound> high_bound(const ordered_json& schema, const std::string& path) {
    return bound_of(schema, "maximum", "exclusiveMaximum", -1, path);
  }

  NodeId integer_of(const ordered_json& schema, const std::string& path) {
    const auto low = low_bound(schema, path), high = high_bound(schema, path);
    return integer_node(b_, low ? first_integer(*low, 1) : -kLargestInteger,
                        high ? first_integer(*high, -1) : kLargestInteger);
  }

  NodeId number_of(const ordered_json& schema, const std::string& path) {
    std::optional<Bound> low = low_bound(schema, path), high = high_bound(schema, path);
    if (!low && !high) return any_number_node(b_);
    // Bounds beyond all the numbers that are written leave all or nothing.
    const auto beyond = [](const Bound& bound) { return bound.whole.size() > kMaxNumberDigits; };
    if ((low && beyond(*low) && !low->negative) || (high && beyond(*high) && high->negative)) return kNever;
    if (low && beyond(*low)) low.reset();
    if (high && beyond(*high)) high.reset();
    for (const auto* bound : {&low, &high})
      if (*bound && (*bound)->whole.size() + (*bound)->fraction.size() > kMaxNumberDigits)
        throw Error(child_path(path, bound == &low ? "minimum" : "maximum"),
                    fmt::format("a bound of at most {} digits", kMaxNumberDigits), "a longer one");
    return number_node(b_, low, high);
  }

  NodeId array_node(const ordered_json& schema, const std::string& path) {
    const int32_t min = count_of(schema, "minItems", 0, path), max = count_of(schema, "maxItems", kUnbounded, path);
    if (const auto* unique = find(schema, "uniqueItems"); unique != nullptr && *unique != false)
      throw Error(child_path(path, "uniqueItems"), "false: it cannot be enforced", "another value", "remove it");
    std::vector<NodeId> first;
    if (const auto* prefix = find(schema, "prefixItems"); prefix != nullptr) {
      const std::string prefix_path = child_path(path, "prefixItems");
      if (list_of(*prefix, prefix_path).size() > kMaxPrefixItems)
        throw Error(prefix_path, fmt::format("at most {} items", kMaxPrefixItems), std::to_string(prefix->size()));
      for (size_t i = 0; i < prefix->size(); i++)
        first.push_back(node_of((*prefix)[i], child_path(prefix_path, std::to_string(i))));
    }
    const auto* items = find(schema, "items");
    if (items != nullptr && items->is_array())
      throw Error(child_path(path, "items"), "one schema for all items", "a list", "write prefixItems");
    const NodeId rest = items != nullptr ? node_of(*items, child_path(path, "items"))
                        : first.empty()  ? json_.any_value()
                                         : kNever;
    if (min > max) return kNever;
    if (first.empty()) return json_.array(json_.list(rest, min, max));
    // After the listed ones; then backwards, one by one.
    const auto n = static_cast<int32_t>(first.size());
    NodeId tail = max <= n
                      ? kEmpty
                      : b_.repeat(b_.seq(json_.comma(), rest), std::max(min - n, 0), max == kUnbounded ? max : max - n);
    for (int32_t i = std::min(n, max); i-- > 0;) {
      const NodeId more = b_.seq({i == 0 ? kEmpty : json_.comma(), first[static_cast<size_t>(i)], tail});
      tail = i >= min ? b_.optional(more) : more;
    }
    return json_.array(tail);
  }

  struct Property {
    std::string name;
    NodeId value;
    bool required;
  };

  NodeId object_node(const ordered_json& schema, const std::string& path) {
    const auto* given = find(schema, "properties");
    const auto* rest = find(schema, "additionalProperties");
    const bool open = rest != nullptr || given == nullptr;
    const NodeId other = rest != nullptr ? node_of(*rest, child_path(path, "additionalProperties")) : json_.any_value();
    const std::string required_path = child_path(path, "required"), properties_path = child_path(path, "properties");
    std::vector<std::string> required;
    if (const auto* list = find(schema, "required"); list != nullptr) {
      if (!list->is_array()) throw Error(required_path, "a list of names", json_type_name(*list));
      for (const auto& name : *list) {
        if (!name.is_string()) throw Error(required_path, "names", json_type_name(name));
        required.push_back(name.get<std::string>());
      }
    }
    std::set<std::string> missing(required.begin(), required.end());
    std::vector<Property> properties;
    if (given != nullptr && !given->is_object()) throw Error(properties_path, "an object", json_type_name(*given));
    if ((given != nullptr ? given->size() : 0) + missing.size() > 2 * kMaxProperties)
      throw Error(properties_path, fmt::format("at most {} properties", kMaxProperties), "more");
    if (given != nullptr)
      for (const auto& [name, value] : given->items())
        properties.push_back({name, node_of(value, child_path(properties_path, name)), missing.erase(name) > 0});
    for (const std::string& name : required)  // demanded, but not described
      if (missing.erase(name) > 0) properties.push_back({name, other, true});
    if (properties.size() > kMaxProperties)
      throw Error(properties_path, fmt::format("at most {} properties", kMaxProperties),
                  std::to_string(properties.size()));

    std::vector<std::string> names;
    bool all_optional = true;
    for (const Property& property : properties) {
      if (property.name.size() > kMaxNameBytes)
        throw Error(child_path(properties_path, property.name),
                    fmt::format("a name of at most {} bytes", kMaxNameBytes), "a longer one");
      names.push_back(property.name);
      all_optional = all_optional && !property.required;
    }
    const NodeId other_pair = open ? json_.other_member(names, other) : kNever;
    // From the last to the first property, in the schema's order. `next`: the members that may come next, without the
    // comma before; `more`: the same after a member, with the comma, or the end where nothing is required any more.
    NodeId more = b_.repeat(b_.seq(json_.comma(), other_pair), 0, kUnbounded);
    NodeId next = b_.seq(other_pair, more);
    bool may_end = true;
    for (size_t i = properties.size(); i-- > 0;) {
      const Property& property = properties[i];
      const NodeId member = b_.seq(json_.member(property.name, property.value), more);
      next = property.required ? member : b_.alt({member, next});
      may_end = may_end && !property.required;
      const NodeId after = b_.seq(json_.comma(), next);
      more = may_end ? b_.optional(after) : after;
    }
    return json_.object(all_optional ? b_.optional(next) : next);
  }

  const ordered_json& root_;
  const std::string where_;
  GraphBuilder b_;
  JsonNodes json_;
  std::unordered_map<const ordered_json*, NodeId> known_;
  std::deque<ordered_json> made_;
  size_t values_ = 0;
  int depth_ = 0;
};

}  // namespace

Graph compile_schema(const ordered_json& schema, const std::string& where) {
  return SchemaCompiler(schema, where).compile();
}

}  // namespace mm::grammar
