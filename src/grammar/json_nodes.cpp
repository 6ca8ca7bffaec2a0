#include "grammar/json_nodes.h"

#include <algorithm>
#include <map>
#include <memory>

#include "base/error.h"
#include "grammar/number_range.h"

namespace mm::grammar {

namespace {

// Names by their characters, to say "any name but these".
struct NameTree {
  std::map<uint32_t, std::unique_ptr<NameTree>> next;
  bool is_name = false;
};

// What may follow here, to the closing quote: depth is bounded by the length of names (json_schema.cpp).
NodeId other_names(CharNodes& chars, const NameTree& tree, NodeId any_rest) {
  GraphBuilder& b = chars.builder();
  std::vector<NodeId> choices;
  if (!tree.is_name) choices.push_back(b.byte('"'));
  CharSet taken;
  for (const auto& [code, child] : tree.next) {
    const CharSet one = CharSet::of({{code, code}});
    taken.add(one);
    choices.push_back(b.seq(chars.of(one), other_names(chars, *child, any_rest)));
  }
  choices.push_back(b.seq(chars.of(taken.inverted()), any_rest));
  return b.alt(choices);
}

// One of the sorted texts, whose first `skip` bytes are equal and have been read. Goes as deep as texts branch.
NodeId one_of_texts(GraphBuilder& b, std::span<const std::string> texts, size_t skip) {
  const std::string_view first = texts.front(), last = texts.back();
  size_t common = skip;
  while (common < first.size() && common < last.size() && first[common] == last[common]) common++;
  std::vector<NodeId> choices;
  for (size_t i = 0; i < texts.size();) {
    size_t end = i + 1;
    if (texts[i].size() == common) {
      choices.push_back(kEmpty);
    } else {
      while (end < texts.size() && texts[end][common] == texts[i][common]) end++;
      choices.push_back(end == i + 1
                            ? b.literal(std::string_view(texts[i]).substr(common))
                            : b.byte(texts[i][common], one_of_texts(b, texts.subspan(i, end - i), common + 1)));
    }
    i = end;
  }
  return b.literal(first.substr(skip, common - skip), b.alt(choices));
}

}  // namespace

std::string quoted(std::string_view text, const std::string& where) {
  try {
    return ordered_json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(where, "valid UTF-8", "a string that is not");
  }
}

NodeId JsonNodes::any_char() {
  if (any_char_ == kNever) any_char_ = any_json_char(b_);
  return any_char_;
}

NodeId JsonNodes::any_string(int32_t min_chars, int32_t max_chars) {
  return string(b_.repeat(any_char(), min_chars, max_chars));
}

NodeId JsonNodes::member(std::string_view name, NodeId value) {
  return b_.seq(b_.literal(quoted(name, b_.where()), colon()), value);
}

NodeId JsonNodes::other_member(const std::vector<std::string>& names, NodeId value) {
  if (value == kNever) return kNever;
  NameTree root;
  for (const std::string& name : names) {
    NameTree* at = &root;
    for (const uint32_t code : decode_utf8(name, b_.where())) {
      auto& child = at->next[code];
      if (!child) {
        b_.spend(100);
        child = std::make_unique<NameTree>();
      }
      at = child.get();
    }
    at->is_name = true;
  }
  const NodeId any_rest = b_.seq(b_.repeat(any_char(), 0, kUnbounded), b_.byte('"'));
  const NodeId name = names.empty() ? any_rest : other_names(chars_, root, any_rest);
  return b_.seq({b_.byte('"'), name, colon(), value});
}

NodeId JsonNodes::list(NodeId item, int32_t min, int32_t max) {
  if (max == 0) return kEmpty;
  const NodeId more = b_.repeat(b_.seq(comma(), item), std::max(min - 1, 0), max == kUnbounded ? max : max - 1);
  const NodeId some = b_.seq(item, more);
  return min == 0 ? b_.optional(some) : some;
}

NodeId JsonNodes::any_value() {
  if (any_value_ != kNever) return any_value_;
  any_value_ = b_.jump("any value");
  b_.set_jump(any_value_, b_.alt({any_object(), any_array(), any_string(), any_number_node(b_), b_.literal("true"),
                                  b_.literal("false"), b_.literal("null")}));
  return any_value_;
}

NodeId JsonNodes::any_object() {
  if (any_object_ != kNever) return any_object_;
  any_object_ = b_.jump("any object");
  b_.set_jump(any_object_, object(list(other_member({}, any_value()), 0, kUnbounded)));
  return any_object_;
}

NodeId JsonNodes::any_array() {
  if (any_array_ != kNever) return any_array_;
  any_array_ = b_.jump("any array");
  b_.set_jump(any_array_, array(list(any_value(), 0, kUnbounded)));
  return any_array_;
}

NodeId JsonNodes::one_of(const std::vector<const ordered_json*>& values) {
  std::vector<NodeId> choices;
  std::vector<std::string> texts;
  for (const ordered_json* value : values) {
    if (value->is_structured()) choices.push_back(exactly(*value));
    else if (value->is_string()) texts.push_back(quoted(value->get_ref<const std::string&>(), b_.where()));
    else texts.push_back(value->dump());
  }
  std::sort(texts.begin(), texts.end());
  texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
  if (!texts.empty()) choices.push_back(one_of_texts(b_, texts, 0));
  return b_.alt(choices);
}

NodeId JsonNodes::exactly(const ordered_json& value) {
  if (value.is_object()) {
    NodeId members = kEmpty;
    for (const auto& [name, part] : value.items()) {
      const NodeId one = member(name, exactly(part));
      members = members == kEmpty ? one : b_.seq({members, comma(), one});
    }
    return object(members);
  }
  if (value.is_array()) {
    NodeId items = kEmpty;
    for (const auto& part : value) {
      const NodeId one = exactly(part);
      items = items == kEmpty ? one : b_.seq({items, comma(), one});
    }
    return array(items);
  }
  return one_of({&value});
}

}  // namespace mm::grammar
