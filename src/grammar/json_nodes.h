// The pieces of JSON texts. White space: one space may follow ':' and ',', nothing else, so that a text cannot run on
// without saying anything.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "grammar/char_set.h"
#include "grammar/graph.h"

namespace mm::grammar {

class JsonNodes {
 public:
  explicit JsonNodes(GraphBuilder& builder) : b_(builder), chars_(builder, CharEncoding::json) {}

  CharNodes& chars() { return chars_; }
  NodeId comma() { return b_.byte(',', space()); }
  NodeId colon() { return b_.byte(':', space()); }
  NodeId string(NodeId content) { return b_.seq({b_.byte('"'), content, b_.byte('"')}); }
  NodeId any_char();  // of a string
  NodeId any_string(int32_t min_chars = 0, int32_t max_chars = kUnbounded);
  // "name": value. The name is written in one way only.
  NodeId member(std::string_view name, NodeId value);
  // A member with any name but these.
  NodeId other_member(const std::vector<std::string>& names, NodeId value);
  NodeId object(NodeId members) { return b_.seq({b_.byte('{'), members, b_.close('}')}); }
  NodeId array(NodeId items) { return b_.seq({b_.byte('['), items, b_.close(']')}); }
  // min to max of `item`, with commas in between.
  NodeId list(NodeId item, int32_t min, int32_t max);
  NodeId any_value();
  NodeId any_object();
  NodeId any_array();
  // One of the values, numbers as nlohmann writes them. Shared beginnings are shared, so long lists are cheap.
  NodeId one_of(const std::vector<const ordered_json*>& values);

 private:
  NodeId exactly(const ordered_json& value);
  NodeId space() { return b_.optional(b_.byte(' ')); }

  GraphBuilder& b_;
  CharNodes chars_;
  NodeId any_char_ = kNever, any_value_ = kNever, any_object_ = kNever, any_array_ = kNever;
};

// A string of a schema as JSON text with its quotes. Error naming `where` if it is not valid UTF-8.
std::string quoted(std::string_view text, const std::string& where);

}  // namespace mm::grammar
