// The compiled form of a language of byte strings: a graph of expressions that refer to each other by number, so that
// recursion is a cycle. Built bottom up by GraphBuilder, which shares equal expressions, then checked once by finish().
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mm::grammar {

using ByteSet = std::array<uint64_t, 4>;  // bit b of the 256

inline bool has_byte(const ByteSet& set, unsigned b) { return set[b / 64] >> (b % 64) & 1; }
void add_bytes(ByteSet& set, unsigned first, unsigned last);

// An element by one of the 32-bit numbers that everything here is known by.
template <class List>
decltype(auto) item(List& list, int32_t index) {
  return list[static_cast<size_t>(index)];
}

using NodeId = int32_t;
inline constexpr NodeId kEmpty = 0;  // the empty text
inline constexpr NodeId kNever = 1;  // no text at all
inline constexpr int32_t kUnbounded = INT32_MAX;

// Containers of JSON that may be open at once, in a schema and in a text.
inline constexpr int kMaxLevels = 64;
inline constexpr size_t kMaxNodes = 100'000;
inline constexpr size_t kMaxSteps = 5'000'000;  // of GraphBuilder::spend()

enum class NodeKind : uint8_t {
  empty,
  never,
  byte,    // a byte of sets[a], then node b
  seq,     // node a, then node b
  alt,     // one of children[a .. a + b)
  repeat,  // node a, min to max times
  jump,    // node a; only while building
};

struct Node {
  NodeKind kind = NodeKind::never;
  bool nullable = false;     // matches the empty text; of a repeat: its body does, or min is 0
  uint8_t level = 0;         // 1: closes a container, which counts as open while this node waits to be reached
  uint8_t height = 0;        // containers that the shortest way through has open at once
  int32_t a = 0, b = 0;      // see NodeKind
  int32_t min = 0, max = 0;  // repeat; max may be kUnbounded
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<NodeId> children;
  std::vector<ByteSet> sets;
  NodeId root = kNever;
  // Bytes that no set tells apart are one class; set_classes: the classes of each set.
  std::array<uint8_t, 256> class_of{};
  int n_classes = 1;
  std::vector<ByteSet> set_classes;
};

class GraphBuilder {
 public:
  explicit GraphBuilder(std::string where);

  NodeId byte(const ByteSet& set, NodeId next = kEmpty);
  NodeId byte(char c, NodeId next = kEmpty);
  NodeId literal(std::string_view text, NodeId next = kEmpty);
  NodeId close(char c);  // the end of a container, see Node::level
  NodeId seq(NodeId a, NodeId b);
  NodeId seq(std::initializer_list<NodeId> parts);
  NodeId alt(const std::vector<NodeId>& choices);
  NodeId repeat(NodeId body, int32_t min, int32_t max);
  NodeId optional(NodeId body) { return alt({kEmpty, body}); }
  // A node to be defined later. `label`, if any, names it in an Error about endless recursion.
  NodeId jump(std::string label = "");
  void set_jump(NodeId jump, NodeId target);
  NodeId import(const Graph& graph);  // its root

  const std::string& where() const { return where_; }
  // Accounts for work of compiling that the size of the result does not bound. Error when it is too much.
  void spend(size_t steps);
  // Removes choices that cannot end, computes nullable and height. Error if nothing can match, if a node needs itself
  // before any byte, or if more than kMaxLevels containers are open at once in every text.
  Graph finish(NodeId root);

 private:
  using Key = std::array<int32_t, 5>;
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  NodeId add(const Node& node);     // a new node
  NodeId shared(const Node& node);  // or the equal one that exists
  NodeId target(NodeId id) const;   // behind jumps
  std::string label_of(NodeId id) const;
  void check_left_recursion();
  void resolve_jumps(NodeId& root);
  void compute_nullable();
  std::vector<int> compute_heights() const;
  void find_classes();

  std::string where_;
  size_t spent_ = 0;
  Graph graph_;
  std::unordered_map<Key, NodeId, KeyHash> known_;
  std::map<std::vector<NodeId>, NodeId> known_alts_;
  std::map<ByteSet, int32_t> known_sets_;
  std::unordered_map<NodeId, std::string> labels_;
};

}  // namespace mm::grammar
