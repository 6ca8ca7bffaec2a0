#include "grammar/graph.h"

#include <algorithm>

#include "base/error.h"

namespace mm::grammar {

namespace {

constexpr int kEndless = 1000;  // height of what cannot end

// Nodes whose value changes are worked off until nothing changes: `update(id)` says whether node id changed.
template <class Update>
void until_stable(const Graph& graph, Update&& update) {
  const size_t n = graph.nodes.size();
  std::vector<int32_t> first(n + 1, 0), users;
  const auto each_part = [&](const Node& node, auto&& visit) {
    switch (node.kind) {
      case NodeKind::byte: visit(node.b); break;
      case NodeKind::seq: visit(node.a), visit(node.b); break;
      case NodeKind::repeat:
      case NodeKind::jump: visit(node.a); break;
      case NodeKind::alt:
        for (int32_t i = 0; i < node.b; i++) visit(item(graph.children, node.a + i));
        break;
      default: break;
    }
  };
  for (const Node& node : graph.nodes) each_part(node, [&](NodeId id) { first[static_cast<size_t>(id) + 1]++; });
  for (size_t i = 0; i < n; i++) first[i + 1] += first[i];
  users.resize(static_cast<size_t>(first[n]));
  std::vector<int32_t> fill(first.begin(), first.end() - 1);
  for (size_t u = 0; u < n; u++)
    each_part(graph.nodes[u], [&](NodeId id) { item(users, item(fill, id)++) = static_cast<int32_t>(u); });
  std::vector<NodeId> queue(n);
  std::vector<char> queued(n, 1);
  for (size_t i = 0; i < n; i++) queue[i] = static_cast<NodeId>(i);
  for (size_t at = 0; at < queue.size(); at++) {
    const NodeId id = queue[at];
    item(queued, id) = 0;
    if (!update(id)) continue;
    for (int32_t i = item(first, id); i < first[static_cast<size_t>(id) + 1]; i++) {
      const NodeId user = item(users, i);
      if (!item(queued, user)) item(queued, user) = 1, queue.push_back(user);
    }
  }
}

}  // namespace

void add_bytes(ByteSet& set, unsigned first, unsigned last) {
  for (unsigned b = first; b <= last; b++) set[b / 64] |= uint64_t{1} << (b % 64);
}

size_t GraphBuilder::KeyHash::operator()(const Key& key) const {
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (const int32_t v : key) h = (h ^ static_cast<uint32_t>(v)) * 0xBF58476D1CE4E5B9u, h ^= h >> 29;
  return static_cast<size_t>(h);
}

GraphBuilder::GraphBuilder(std::string where) : where_(std::move(where)) {
  graph_.nodes.push_back({.kind = NodeKind::empty, .nullable = true});
  graph_.nodes.push_back({.kind = NodeKind::never});
}

void GraphBuilder::spend(size_t steps) {
  spent_ += steps;
  if (spent_ > kMaxSteps)
    throw Error(where_, "patterns that compile in a moment", "more work than that",
                "shorten patterns or their repetitions");
}

NodeId GraphBuilder::add(const Node& node) {
  if (graph_.nodes.size() >= kMaxNodes)
    throw Error(where_, fmt::format("a grammar of at most {} nodes", kMaxNodes), "a larger one",
                "shorten enumerations, repetitions or patterns");
  graph_.nodes.push_back(node);
  return static_cast<NodeId>(graph_.nodes.size() - 1);
}

NodeId GraphBuilder::shared(const Node& node) {
  const Key key{static_cast<int32_t>(node.kind) | node.level << 8, node.a, node.b, node.min, node.max};
  const auto it = known_.find(key);
  if (it != known_.end()) return it->second;
  return known_[key] = add(node);
}

NodeId GraphBuilder::byte(const ByteSet& set, NodeId next) {
  if (next == kNever || set == ByteSet{}) return kNever;
  const auto [it, fresh] = known_sets_.try_emplace(set, static_cast<int32_t>(graph_.sets.size()));
  if (fresh) graph_.sets.push_back(set);
  return shared({.kind = NodeKind::byte, .a = it->second, .b = next});
}

NodeId GraphBuilder::byte(char c, NodeId next) {
  ByteSet set{};
  add_bytes(set, static_cast<uint8_t>(c), static_cast<uint8_t>(c));
  return byte(set, next);
}

NodeId GraphBuilder::literal(std::string_view text, NodeId next) {
  for (size_t i = text.size(); i-- > 0;) next = byte(text[i], next);
  return next;
}

NodeId GraphBuilder::close(char c) {
  Node node = item(graph_.nodes, byte(c));
  node.level = 1;
  return shared(node);
}

NodeId GraphBuilder::seq(NodeId a, NodeId b) {
  if (a == kNever || b == kNever) return kNever;
  if (a == kEmpty) return b;
  if (b == kEmpty) return a;
  // A short chain of bytes takes b as its end: one node less to walk at run time.
  std::array<int32_t, 8> chain;
  size_t length = 0;
  NodeId at = a;
  while (length < chain.size() && at != kEmpty) {
    const Node& node = item(graph_.nodes, at);
    if (node.kind != NodeKind::byte || node.level > 0) break;
    chain[length++] = node.a;
    at = node.b;
  }
  if (at != kEmpty) return shared({.kind = NodeKind::seq, .a = a, .b = b});
  while (length > 0) b = shared({.kind = NodeKind::byte, .a = chain[--length], .b = b});
  return b;
}

NodeId GraphBuilder::seq(std::initializer_list<NodeId> parts) {
  NodeId all = kEmpty;
  for (auto it = parts.end(); it != parts.begin();) all = seq(*--it, all);
  return all;
}

NodeId GraphBuilder::alt(const std::vector<NodeId>& choices) {
  // Single bytes with the same continuation become one set.
  std::map<NodeId, ByteSet> by_next;
  std::vector<NodeId> rest;
  for (const NodeId id : choices) {
    const Node& node = item(graph_.nodes, id);
    if (node.kind == NodeKind::byte && node.level == 0) {
      ByteSet& set = by_next.try_emplace(node.b, ByteSet{}).first->second;
      for (size_t i = 0; i < set.size(); i++) set[i] |= item(graph_.sets, node.a)[i];
    } else if (id != kNever) {
      rest.push_back(id);
    }
  }
  for (const auto& [next, set] : by_next) rest.push_back(byte(set, next));
  std::sort(rest.begin(), rest.end());
  rest.erase(std::unique(rest.begin(), rest.end()), rest.end());
  if (rest.empty()) return kNever;
  if (rest.size() == 1) return rest[0];
  const auto it = known_alts_.find(rest);
  if (it != known_alts_.end()) return it->second;
  const NodeId id = add({.kind = NodeKind::alt,
                         .a = static_cast<int32_t>(graph_.children.size()),
                         .b = static_cast<int32_t>(rest.size())});
  graph_.children.insert(graph_.children.end(), rest.begin(), rest.end());
  if (graph_.children.size() > 2 * kMaxNodes)
    throw Error(where_, fmt::format("a grammar of at most {} choices", 2 * kMaxNodes), "a larger one",
                "shorten enumerations or alternatives");
  known_alts_.emplace(std::move(rest), id);
  return id;
}

NodeId GraphBuilder::repeat(NodeId body, int32_t min, int32_t max) {
  MM_CHECK(0 <= min && min <= max, "{} to {}", min, max);
  if (max == 0 || body == kEmpty) return kEmpty;
  if (body == kNever) return min == 0 ? kEmpty : kNever;
  if (max == 1) return min == 1 ? body : optional(body);
  return shared({.kind = NodeKind::repeat, .a = body, .min = min, .max = max});
}

NodeId GraphBuilder::jump(std::string label) {
  const NodeId id = add({.kind = NodeKind::jump, .a = kNever});
  if (!label.empty()) labels_.emplace(id, std::move(label));
  return id;
}

void GraphBuilder::set_jump(NodeId jump, NodeId target) { item(graph_.nodes, jump).a = target; }

NodeId GraphBuilder::import(const Graph& graph) {
  const auto offset = static_cast<NodeId>(graph_.nodes.size());
  const auto moved = [&](NodeId id) { return id <= kNever ? id : id - 2 + offset; };
  std::vector<int32_t> sets;
  for (const ByteSet& set : graph.sets) {
    const auto [it, fresh] = known_sets_.try_emplace(set, static_cast<int32_t>(graph_.sets.size()));
    if (fresh) graph_.sets.push_back(set);
    sets.push_back(it->second);
  }
  const auto first_child = static_cast<int32_t>(graph_.children.size());
  for (const NodeId id : graph.children) graph_.children.push_back(moved(id));
  for (size_t i = 2; i < graph.nodes.size(); i++) {
    Node node = graph.nodes[i];
    if (node.kind == NodeKind::alt) node.a += first_child;
    else if (node.kind == NodeKind::byte) node.a = item(sets, node.a), node.b = moved(node.b);
    else node.a = moved(node.a), node.b = node.kind == NodeKind::seq ? moved(node.b) : 0;
    add(node);
  }
  return moved(graph.root);
}

NodeId GraphBuilder::target(NodeId id) const {
  for (size_t steps = 0; item(graph_.nodes, id).kind == NodeKind::jump; steps++) {
    MM_CHECK(steps < graph_.nodes.size());  // cycles are left recursion, refused before
    id = item(graph_.nodes, id).a;
  }
  return id;
}

std::string GraphBuilder::label_of(NodeId id) const {
  const auto it = labels_.find(id);
  return it == labels_.end() ? where_ : it->second;
}

void GraphBuilder::compute_nullable() {
  until_stable(graph_, [&](NodeId id) {
    Node& node = item(graph_.nodes, id);
    if (node.nullable) return false;
    const auto nullable = [&](NodeId part) { return item(graph_.nodes, part).nullable; };
    if (node.kind == NodeKind::seq) node.nullable = nullable(node.a) && nullable(node.b);
    else if (node.kind == NodeKind::repeat) node.nullable = node.min == 0 || nullable(node.a);
    else if (node.kind == NodeKind::jump) node.nullable = nullable(node.a);
    else if (node.kind == NodeKind::alt)
      for (int32_t i = 0; i < node.b; i++) node.nullable |= nullable(item(graph_.children, node.a + i));
    return node.nullable;
  });
}

// The edges that are followed before a byte is read must not form a cycle: depth first, white, grey, black.
void GraphBuilder::check_left_recursion() {
  const auto part = [&](const Node& node, size_t i) -> NodeId {  // the i-th node that may come first, or -1
    switch (node.kind) {
      case NodeKind::alt:
        return i < static_cast<size_t>(node.b) ? graph_.children[static_cast<size_t>(node.a) + i] : -1;
      case NodeKind::repeat:
      case NodeKind::jump: return i == 0 ? node.a : -1;
      case NodeKind::seq:
        if (i == 0) return node.a;
        return i == 1 && item(graph_.nodes, node.a).nullable ? node.b : -1;
      default: return -1;
    }
  };
  std::vector<char> color(graph_.nodes.size(), 0);
  std::vector<std::pair<NodeId, size_t>> path;
  for (size_t start = 0; start < graph_.nodes.size(); start++) {
    if (color[start] != 0) continue;
    path.emplace_back(static_cast<NodeId>(start), 0);
    color[start] = 1;
    while (!path.empty()) {
      const NodeId next = part(item(graph_.nodes, path.back().first), path.back().second++);
      if (next < 0) {
        item(color, path.back().first) = 2;
        path.pop_back();
      } else if (item(color, next) == 0) {
        item(color, next) = 1;
        path.emplace_back(next, 0);
      } else if (item(color, next) == 1) {
        std::string label = label_of(next);
        for (size_t i = path.size(); i-- > 0 && path[i].first != next && !labels_.contains(next);)
          if (labels_.contains(path[i].first)) label = label_of(path[i].first);
        throw Error(label, "a schema that ends", "one that refers to itself without anything in between",
                    "break the cycle of $ref");
      }
    }
  }
}

void GraphBuilder::resolve_jumps(NodeId& root) {
  for (NodeId& id : graph_.children) id = target(id);
  for (Node& node : graph_.nodes) {
    if (node.kind == NodeKind::byte || node.kind == NodeKind::seq) node.b = target(node.b);
    if (node.kind == NodeKind::seq || node.kind == NodeKind::repeat) node.a = target(node.a);
  }
  root = target(root);
}

std::vector<int> GraphBuilder::compute_heights() const {
  std::vector<int> height(graph_.nodes.size(), kEndless);
  until_stable(graph_, [&](NodeId id) {
    const Node& node = item(graph_.nodes, id);
    const auto of = [&](NodeId part) { return item(height, part); };
    int h = kEndless;
    switch (node.kind) {
      case NodeKind::empty: h = 0; break;
      case NodeKind::never: break;
      case NodeKind::byte: h = std::max<int>(of(node.b), node.level); break;
      case NodeKind::seq: h = std::max(of(node.a) + item(graph_.nodes, node.b).level, of(node.b)); break;
      case NodeKind::repeat: h = node.min == 0 ? 0 : of(node.a); break;
      case NodeKind::jump: h = of(node.a); break;
      case NodeKind::alt:
        for (int32_t i = 0; i < node.b; i++) h = std::min(h, of(item(graph_.children, node.a + i)));
        break;
    }
    h = std::min(h, kEndless);
    if (h >= item(height, id)) return false;
    item(height, id) = h;
    return true;
  });
  return height;
}

// Refined by one set after the other: the members of a class that are in the set part from those that are not.
void GraphBuilder::find_classes() {
  for (const ByteSet& set : graph_.sets) {
    std::array<std::array<int, 2>, 256> part;
    for (auto& p : part) p = {-1, -1};
    graph_.n_classes = 0;
    for (unsigned b = 0; b < 256; b++) {
      int& to = part[graph_.class_of[b]][has_byte(set, b)];
      if (to < 0) to = graph_.n_classes++;
      graph_.class_of[b] = static_cast<uint8_t>(to);
    }
  }
  for (const ByteSet& set : graph_.sets) {
    ByteSet& classes = graph_.set_classes.emplace_back();
    for (unsigned b = 0; b < 256; b++)
      if (has_byte(set, b)) add_bytes(classes, graph_.class_of[b], graph_.class_of[b]);
  }
}

Graph GraphBuilder::finish(NodeId root) {
  compute_nullable();
  check_left_recursion();
  const std::string label = label_of(root);
  resolve_jumps(root);
  const std::vector<int> height = compute_heights();
  const auto ends = [&](NodeId id) { return item(height, id) <= kMaxLevels; };
  if (item(height, root) >= kEndless)
    throw Error(label, "a language with at least one text", "none: a required part has no finite value",
                "look for contradicting keywords, or recursion that never ends");
  if (!ends(root)) throw Error(label, fmt::format("values nested at most {} deep", kMaxLevels), "deeper nesting");
  for (size_t i = 0; i < graph_.nodes.size(); i++) {
    Node& node = graph_.nodes[i];
    node.height = static_cast<uint8_t>(std::min(height[i], 255));
    if (node.kind == NodeKind::alt) {
      const auto begin = graph_.children.begin() + node.a;
      node.b =
          static_cast<int32_t>(std::remove_if(begin, begin + node.b, [&](NodeId id) { return !ends(id); }) - begin);
    } else if (node.kind == NodeKind::repeat) {
      // A body that may be empty needs no passes that read nothing; one that cannot end is never begun.
      if (item(graph_.nodes, node.a).nullable) node.min = 0;
      if (!ends(node.a) && node.min == 0) node = {.kind = NodeKind::empty, .nullable = true};
    }
  }
  find_classes();
  graph_.root = root;
  return std::move(graph_);
}

}  // namespace mm::grammar
