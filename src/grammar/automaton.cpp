#include "grammar/automaton.h"

#include <algorithm>

#include "base/error.h"
#include "grammar/token_table.h"

namespace mm::grammar {

namespace {

constexpr size_t kMaxWork = 500'000;    // expressions visited for one mask; a usual one needs some thousand
constexpr size_t kMaxBytes = 16 << 20;  // kept before a new automaton takes over

uint64_t mixed(uint64_t h, uint64_t v) {
  h = (h ^ v) * 0xBF58476D1CE4E5B9u;
  return h ^ h >> 29;
}

// Finds the slot of an equal entry or a free one.
template <class Equal>
size_t find_slot(const std::vector<int32_t>& slots, uint64_t hash, Equal&& equal) {
  size_t at = hash & (slots.size() - 1);
  while (slots[at] >= 0 && !equal(slots[at])) at = (at + 1) & (slots.size() - 1);
  return at;
}

template <class HashOf>
void grow(std::vector<int32_t>& slots, size_t entries, HashOf&& hash_of) {
  if (entries * 2 < slots.size()) return;
  slots.assign(slots.size() * 2, -1);
  for (size_t i = 0; i < entries; i++)
    slots[find_slot(slots, hash_of(i), [](int32_t) { return false; })] = static_cast<int32_t>(i);
}

}  // namespace

Automaton::Automaton(const Graph& graph, TokenTable table)
    : graph_(graph), table_(std::move(table)), cell_slots_(256, -1), place_slots_(256, -1) {
  cells_.push_back({.node = kEmpty, .count = 0, .next = kEndCell, .shape = 0, .levels = 0, .may_end = true});
  place({});  // kDead
  trail_.resize(table_.impl().longest + 1);
}

bool Automaton::head_may_be_empty(const Cell& c) const {
  const Node& node = item(graph_.nodes, c.node);
  return node.kind == NodeKind::repeat ? c.count >= node.min : node.nullable;
}

int32_t Automaton::cell(NodeId node, int32_t count, int32_t next) {
  if (node == kEmpty) return next;
  const Node& expression = item(graph_.nodes, node);
  const int levels = item(cells_, next).levels;
  if (levels + expression.height > kMaxLevels) return kNoCell;
  const auto hash_of = [](const Cell& c) {
    return mixed(mixed(mixed(0x9E3779B97F4A7C15u, static_cast<uint32_t>(c.node)), static_cast<uint32_t>(c.count)),
                 static_cast<uint32_t>(c.next));
  };
  const uint64_t passes = static_cast<uint32_t>(std::min(count, expression.min));
  const uint64_t shape = mixed(mixed(static_cast<uint32_t>(node), passes), item(cells_, next).shape);
  Cell made{.node = node,
            .count = count,
            .next = next,
            .shape = static_cast<uint32_t>(shape),
            .levels = static_cast<uint8_t>(levels + expression.level),
            .may_end = false};
  const size_t slot = find_slot(cell_slots_, hash_of(made), [&](int32_t i) {
    const Cell& c = item(cells_, i);
    return c.node == node && c.count == count && c.next == next;
  });
  if (cell_slots_[slot] >= 0) return cell_slots_[slot];
  made.may_end = head_may_be_empty(made) && item(cells_, next).may_end;
  const auto id = static_cast<int32_t>(cells_.size());
  cell_slots_[slot] = id;
  cells_.push_back(made);
  grow(cell_slots_, cells_.size(), [&](size_t i) { return hash_of(cells_[i]); });
  return id;
}

bool Automaton::before(int32_t a, int32_t b) const {
  const uint32_t shape_a = item(cells_, a).shape, shape_b = item(cells_, b).shape;
  return shape_a != shape_b ? shape_a < shape_b : a < b;
}

// The same expressions, where a may pass through repeats at least as often. "(\\w{1,30} ?){1,9}" can cut a word in many
// ways; only the few that leave most passes are worth keeping.
bool Automaton::dominates(int32_t a, int32_t b) const {
  for (; a != b; a = item(cells_, a).next, b = item(cells_, b).next) {
    const Cell &of_a = item(cells_, a), &of_b = item(cells_, b);
    if (of_a.shape != of_b.shape || of_a.node != of_b.node || of_a.count > of_b.count) return false;
    if (of_a.count < of_b.count && of_a.count < item(graph_.nodes, of_a.node).min) return false;
  }
  return true;
}

void Automaton::add_target(int32_t target) {
  constexpr size_t most = 32;  // compared; enough for what people write
  size_t from = targets_.size();
  const uint32_t shape = item(cells_, target).shape;
  while (from > 0 && targets_.size() - from < most && item(cells_, targets_[from - 1]).shape == shape) from--;
  const auto group = targets_.begin() + static_cast<std::ptrdiff_t>(from);
  if (std::any_of(group, targets_.end(), [&](int32_t t) { return dominates(t, target); })) return;
  targets_.erase(std::remove_if(group, targets_.end(), [&](int32_t t) { return dominates(target, t); }),
                 targets_.end());
  targets_.push_back(target);
}

Automaton::State Automaton::place(std::span<const int32_t> members) {
  const auto hash_of = [](std::span<const int32_t> list) {
    uint64_t h = list.size();
    for (const int32_t c : list) h = mixed(h, static_cast<uint32_t>(c));
    return h;
  };
  const auto members_of = [&](size_t i) {
    return std::span<const int32_t>(members_).subspan(places_[i].first, places_[i].size);
  };
  const size_t slot = find_slot(place_slots_, hash_of(members), [&](int32_t i) {
    return std::ranges::equal(members_of(static_cast<size_t>(i)), members);
  });
  if (place_slots_[slot] >= 0) return place_slots_[slot];
  const auto id = static_cast<State>(places_.size());
  place_slots_[slot] = id;
  const bool may_end = std::any_of(members.begin(), members.end(), [&](int32_t c) { return item(cells_, c).may_end; });
  places_.push_back({.first = static_cast<uint32_t>(members_.size()),
                     .size = static_cast<uint32_t>(members.size()),
                     .may_end = may_end});
  members_.insert(members_.end(), members.begin(), members.end());
  grow(place_slots_, places_.size(), [&](size_t i) { return hash_of(members_of(i)); });
  return id;
}

// What may be read first in `node` with `next` below: a byte becomes a move, the rest is remembered for expand().
void Automaton::visit(NodeId node, int32_t count, int32_t next) {
  work_++;
  const Node& expression = item(graph_.nodes, node);
  if (expression.kind == NodeKind::empty || expression.kind == NodeKind::never) return;
  if (expression.kind == NodeKind::byte) {
    const int32_t target = cell(expression.b, 0, next);
    if (target != kNoCell) moves_.push_back({expression.a, target});
    return;
  }
  const int32_t id = cell(node, count, next);
  if (id == kNoCell || item(cells_, id).seen == round_) return;
  item(cells_, id).seen = round_;
  todo_.push_back(id);
}

bool Automaton::expand(State state) {
  moves_.clear();
  round_++;
  for (uint32_t i = 0; i < item(places_, state).size; i++) {
    int32_t top = members_[item(places_, state).first + i];
    // The stack's head, and what is below as long as all above may be empty.
    while (top != kEndCell && item(cells_, top).passed != round_) {
      const Cell head = item(cells_, top);
      item(cells_, top).passed = round_;
      visit(head.node, head.count, head.next);
      if (!head_may_be_empty(head)) break;
      top = head.next;
    }
    while (!todo_.empty()) {
      if (work_ > work_limit_) return todo_.clear(), false;
      const Cell at = item(cells_, todo_.back());
      todo_.pop_back();
      const Node& node = item(graph_.nodes, at.node);
      if (node.kind == NodeKind::alt) {
        for (int32_t c = 0; c < node.b; c++) visit(item(graph_.children, node.a + c), 0, at.next);
      } else if (node.kind == NodeKind::seq) {
        const int32_t below = cell(node.b, 0, at.next);
        if (below != kNoCell) visit(node.a, 0, below);
        if (item(graph_.nodes, node.a).nullable) visit(node.b, 0, at.next);
      } else if (at.count < node.max) {  // repeat: one pass, which reads something, then the rest of them
        const int32_t done = node.max == kUnbounded ? std::min(at.count + 1, node.min) : at.count + 1;
        const int32_t below = done == node.max ? at.next : cell(at.node, done, at.next);
        if (below != kNoCell) visit(node.a, 0, below);
      }
    }
  }
  const auto row = static_cast<int32_t>(rows_.size());
  rows_.resize(rows_.size() + static_cast<size_t>(graph_.n_classes), kDead);
  fill_row(row);
  item(places_, state).row = row;
  return true;
}

// For each class of bytes the place that the moves with it lead to. Classes of the same moves share a look-up.
void Automaton::fill_row(int32_t row) {
  std::sort(moves_.begin(), moves_.end(), [&](const Move& a, const Move& b) { return before(a.target, b.target); });
  const auto collect = [&](int c) {
    targets_.clear();
    for (const Move& move : moves_)
      if (has_byte(item(graph_.set_classes, move.set), static_cast<unsigned>(c))) add_target(move.target);
    return targets_.empty() ? kDead : place(targets_);
  };
  constexpr int kWord = 64;
  std::array<uint64_t, 256> signature{};
  const bool small = moves_.size() <= kWord;
  if (small) {
    for (size_t m = 0; m < moves_.size(); m++) {
      const ByteSet& classes = item(graph_.set_classes, moves_[m].set);
      for (int c = 0; c < graph_.n_classes; c++)
        item(signature, c) |= uint64_t{has_byte(classes, static_cast<unsigned>(c))} << m;
    }
  }
  std::vector<std::pair<uint64_t, State>> known;
  for (int c = 0; c < graph_.n_classes; c++) {
    State& to = item(rows_, row + c);
    if (!small) {
      to = collect(c);
      continue;
    }
    const uint64_t s = item(signature, c);
    if (s == 0) continue;
    const auto it = std::find_if(known.begin(), known.end(), [&](const auto& k) { return k.first == s; });
    if (it != known.end()) to = it->second;
    else known.emplace_back(s, to = collect(c));
  }
  work_ += small ? moves_.size() : moves_.size() * static_cast<size_t>(graph_.n_classes) / 4;
}

Automaton::State Automaton::next_state(State state, uint8_t byte) {
  if (item(places_, state).row < 0 && !expand(state)) return -1;
  return item(rows_, item(places_, state).row + graph_.class_of[byte]);
}

Automaton::State Automaton::start() {
  const std::lock_guard lock(mutex_);
  const int32_t root = cell(graph_.root, 0, kEndCell);
  return place({&root, 1});
}

Automaton::State Automaton::step(State state, std::string_view bytes) {
  const std::lock_guard lock(mutex_);
  // What a mask allowed must be accepted, also by an automaton that has to learn again what that mask cost: so each
  // byte may take more than a whole mask.
  work_limit_ = 4 * kMaxWork;
  for (const char c : bytes) {
    work_ = 0;
    state = next_state(state, static_cast<uint8_t>(c));
    if (state <= kDead) break;
  }
  account();
  return std::max(state, kDead);
}

bool Automaton::complete(State state) {
  const std::lock_guard lock(mutex_);
  return item(places_, state).may_end;
}

bool Automaton::finished(State state) {
  const std::lock_guard lock(mutex_);
  work_ = 0;
  work_limit_ = kMaxWork;
  if (!item(places_, state).may_end) return false;
  if (item(places_, state).row < 0 && !expand(state)) return false;
  const auto row = rows_.begin() + item(places_, state).row;
  return std::all_of(row, row + graph_.n_classes, [](State to) { return to == kDead; });
}

// A token makes at most as many passes of a repeat as it has bytes. So counts that are further than the longest token
// from both of its limits need not be told apart: one mask serves nearly all places in a string of limited length.
Automaton::State Automaton::representative(State state) {
  const auto longest = static_cast<int64_t>(table_.impl().longest);
  std::vector<int32_t> members, path;
  for (uint32_t i = 0; i < item(places_, state).size; i++) {
    int32_t top = members_[item(places_, state).first + i];
    for (; top != kEndCell; top = item(cells_, top).next) path.push_back(top);
    for (; !path.empty(); path.pop_back()) {
      const Cell& c = item(cells_, path.back());
      const Node& node = item(graph_.nodes, c.node);
      int32_t count = c.count;
      if (node.kind == NodeKind::repeat && (node.max == kUnbounded || node.max - count > longest)) {
        if (count >= node.min) count = node.min;
        else if (node.min - count > longest) count = 0;
      }
      top = cell(c.node, count, top);
      MM_CHECK(top != kNoCell);
    }
    members.push_back(top);
  }
  std::sort(members.begin(), members.end(), [&](int32_t a, int32_t b) { return before(a, b); });
  members.erase(std::unique(members.begin(), members.end()), members.end());
  return place(members);
}

void Automaton::mask(State state, std::span<uint32_t> bits) {
  const std::lock_guard lock(mutex_);
  if (bits.empty()) return;
  const auto mask_index = [&](State of) -> int32_t& { return item(places_, of).mask; };
  if (mask_index(state) < 0) {
    const State like = representative(state);
    if (mask_index(like) < 0) {
      const auto first = masks_.size();
      masks_.resize(first + bits.size(), 0);
      work_ = 0;
      work_limit_ = kMaxWork;
      if (!walk(like, masks_.data() + first))
        std::fill(masks_.begin() + static_cast<std::ptrdiff_t>(first), masks_.end(), 0u);
      mask_index(like) = static_cast<int32_t>(first / bits.size());
    }
    mask_index(state) = mask_index(like);
    account();
  }
  const auto first =
      masks_.begin() + static_cast<std::ptrdiff_t>(mask_index(state)) * static_cast<std::ptrdiff_t>(bits.size());
  std::copy(first, first + static_cast<std::ptrdiff_t>(bits.size()), bits.begin());
}

bool Automaton::walk(State state, uint32_t* bits) {
  const TokenTable::Impl& tree = table_.impl();
  const size_t n = tree.byte.size();
  trail_[0] = state;
  for (size_t i = 0; i < n;) {
    const State to = next_state(trail_[tree.depth[i] - 1], tree.byte[i]);
    if (to < 0) return false;
    if (to == kDead) {
      i = tree.after[i];
      continue;
    }
    trail_[tree.depth[i]] = to;
    for (uint32_t t = tree.first_id[i]; t < tree.first_id[i + 1]; t++)
      bits[tree.ids[t] / 32] |= 1u << (tree.ids[t] % 32);
    i++;
  }
  return true;
}

void Automaton::account() {
  const size_t bytes = cells_.size() * sizeof(Cell) + (cell_slots_.size() + place_slots_.size() + members_.size()) * 4 +
                       places_.size() * sizeof(Place) + (rows_.size() + masks_.size()) * 4;
  if (bytes > kMaxBytes) full_.store(true, std::memory_order_relaxed);
}

Automaton::State Automaton::adopt(Automaton& other, State state) {
  const std::scoped_lock lock(mutex_, other.mutex_);
  std::vector<int32_t> members, path;
  for (uint32_t i = 0; i < item(other.places_, state).size; i++) {
    path.clear();
    for (int32_t c = other.members_[item(other.places_, state).first + i]; c != kEndCell;
         c = item(other.cells_, c).next)
      path.push_back(c);
    int32_t made = kEndCell;
    for (; !path.empty(); path.pop_back()) {
      const Cell& c = item(other.cells_, path.back());
      made = cell(c.node, c.count, made);
      MM_CHECK(made != kNoCell);
    }
    members.push_back(made);
  }
  std::sort(members.begin(), members.end(), [&](int32_t a, int32_t b) { return before(a, b); });
  return place(members);
}

}  // namespace mm::grammar
