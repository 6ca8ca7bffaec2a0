// Texts that several expressions match and whose length is bounded: a product of deterministic automata over
// characters, without the states from which no end can be reached, so that a mask never leads into one.
#include <algorithm>
#include <map>

#include "base/error.h"
#include "grammar/regex.h"

namespace mm::grammar {

namespace {

constexpr size_t kMaxNfa = 20'000;     // states of one expression with its repetitions written out
constexpr size_t kMaxStates = 10'000;  // deterministic states, of one expression and of the product

[[noreturn]] void too_complex(const std::string& where) {
  throw Error(where, fmt::format("a pattern whose automaton has at most {} states", kMaxStates), "a larger one",
              "shorten its repetitions, or drop minLength and maxLength beside it");
}

// Thompson's construction: each state has a character edge or up to two empty ones.
struct Nfa {
  struct State {
    int32_t set = -1;  // index of the edge's character set
    int32_t to = -1, or_to = -1;
  };
  std::vector<State> states;
  std::vector<CharSet> sets;
  int32_t start = 0, end = 0;
};

class NfaBuilder {
 public:
  NfaBuilder(const Regex& regex, const std::string& where) : where_(where) {
    nfa_.end = add({});
    nfa_.start = build(regex, nfa_.end);
  }
  Nfa take() { return std::move(nfa_); }

 private:
  int32_t add(Nfa::State state) {
    if (nfa_.states.size() >= kMaxNfa) too_complex(where_);
    nfa_.states.push_back(state);
    return static_cast<int32_t>(nfa_.states.size() - 1);
  }

  int32_t build(const Regex& r, int32_t next) {  // the state that matches r and goes on in `next`
    switch (r.kind) {
      case Regex::Kind::chars: {
        const auto it = std::find(nfa_.sets.begin(), nfa_.sets.end(), r.chars);
        const auto set = static_cast<int32_t>(it - nfa_.sets.begin());
        if (it == nfa_.sets.end()) nfa_.sets.push_back(r.chars);
        return add({.set = set, .to = next});
      }
      case Regex::Kind::concat:
        for (size_t i = r.parts.size(); i-- > 0;) next = build(r.parts[i], next);
        return next;
      case Regex::Kind::alternate: {
        int32_t all = -1;
        for (const Regex& part : r.parts) {
          const int32_t one = build(part, next);
          all = all < 0 ? one : add({.to = one, .or_to = all});
        }
        return all;
      }
      case Regex::Kind::repeat: {
        if (r.max == kUnbounded) {
          const int32_t loop = add({.or_to = next});
          const int32_t body = build(r.parts[0], loop);
          item(nfa_.states, loop).to = body;
          next = loop;
        } else {
          const int32_t end = next;
          for (int32_t i = r.min; i < r.max; i++) next = add({.to = build(r.parts[0], next), .or_to = end});
        }
        for (int32_t i = 0; i < r.min; i++) next = add({.to = build(r.parts[0], next)});
        return next;
      }
      default: MM_CHECK(false, "anchors are taken off by parse_regex");
    }
  }

  const std::string& where_;
  Nfa nfa_;
};

// The coarsest partition of characters that every set is a union of.
std::vector<CharSet> partition(const std::vector<const CharSet*>& sets, std::vector<std::vector<int32_t>>& classes_of,
                               GraphBuilder& b) {
  std::vector<uint32_t> cuts{0};
  for (const CharSet* set : sets)
    for (const auto& [first, last] : set->ranges()) cuts.push_back(first), cuts.push_back(last + 1);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  b.spend(cuts.size() * (1 + sets.size()));
  std::map<std::vector<bool>, size_t> known;
  std::vector<CharSet> classes;
  for (size_t i = 0; i < cuts.size() && cuts[i] <= kMaxChar; i++) {
    std::vector<bool> signature(sets.size());
    for (size_t s = 0; s < sets.size(); s++) signature[s] = sets[s]->contains(cuts[i]);
    const auto [it, fresh] = known.try_emplace(std::move(signature), classes.size());
    if (fresh) classes.emplace_back();
    classes[it->second].add(cuts[i], i + 1 < cuts.size() ? cuts[i + 1] - 1 : kMaxChar);
  }
  classes_of.assign(sets.size(), {});
  for (const auto& [signature, index] : known)
    for (size_t s = 0; s < sets.size(); s++)
      if (signature[s]) classes_of[s].push_back(static_cast<int32_t>(index));
  return classes;
}

struct Dfa {
  std::vector<std::vector<int32_t>> to;  // [state][class], -1: none; state 0 is the start
  std::vector<bool> accepts;
};

// classes_of[first_set + i]: the classes in nfa.sets[i].
Dfa determinize(const Nfa& nfa, size_t n_classes, const std::vector<std::vector<int32_t>>& classes_of, size_t first_set,
                GraphBuilder& b, const std::string& where) {
  Dfa dfa;
  std::map<std::vector<int32_t>, int32_t> known;
  std::vector<const std::vector<int32_t>*> todo;
  std::vector<size_t> seen(nfa.states.size(), 0);
  size_t round = 0;
  const auto add = [&](std::vector<int32_t> roots) {
    round++;
    std::vector<int32_t> members;
    bool accepts = false;
    while (!roots.empty()) {
      const int32_t at = roots.back();
      roots.pop_back();
      if (at < 0 || item(seen, at) == round) continue;
      item(seen, at) = round;
      b.spend(1);
      const Nfa::State& state = item(nfa.states, at);
      accepts = accepts || at == nfa.end;
      if (state.set >= 0) members.push_back(at);
      else roots.push_back(state.to), roots.push_back(state.or_to);
    }
    std::sort(members.begin(), members.end());
    if (accepts) members.push_back(nfa.end);
    const auto [it, fresh] = known.try_emplace(std::move(members), static_cast<int32_t>(dfa.to.size()));
    if (fresh) {
      if (dfa.to.size() >= kMaxStates) too_complex(where);
      dfa.to.emplace_back(n_classes, -1);
      dfa.accepts.push_back(accepts);
      todo.push_back(&it->first);
    }
    return it->second;
  };
  add({nfa.start});
  std::vector<std::vector<int32_t>> targets(n_classes);
  for (size_t i = 0; i < todo.size(); i++) {
    for (auto& t : targets) t.clear();
    for (const int32_t at : *todo[i]) {
      const Nfa::State& state = item(nfa.states, at);
      if (state.set < 0) continue;
      for (const int32_t c : classes_of[first_set + static_cast<size_t>(state.set)]) {
        b.spend(1);
        item(targets, c).push_back(state.to);
      }
    }
    for (size_t c = 0; c < n_classes; c++)
      if (!targets[c].empty()) dfa.to[i][c] = add(targets[c]);
  }
  return dfa;
}

// Which states of the product can reach an accepting one, walking edges backwards.
std::vector<bool> live_states(const std::vector<std::vector<int32_t>>& to, const std::vector<bool>& accepts) {
  std::vector<std::vector<int32_t>> from(to.size());
  for (size_t s = 0; s < to.size(); s++)
    for (const int32_t t : to[s])
      if (t >= 0 && (item(from, t).empty() || item(from, t).back() != static_cast<int32_t>(s)))
        item(from, t).push_back(static_cast<int32_t>(s));
  std::vector<bool> live = accepts;
  std::vector<size_t> todo;
  for (size_t s = 0; s < to.size(); s++)
    if (live[s]) todo.push_back(s);
  while (!todo.empty()) {
    const size_t s = todo.back();
    todo.pop_back();
    for (const int32_t f : from[s])
      if (!item(live, f)) item(live, f) = true, todo.push_back(static_cast<size_t>(f));
  }
  return live;
}

}  // namespace

NodeId intersection_node(CharNodes& chars, const std::vector<Regex>& all, int32_t min, int32_t max,
                         const std::string& where) {
  GraphBuilder& b = chars.builder();
  std::vector<Nfa> nfas;
  std::vector<const CharSet*> sets;
  nfas.reserve(all.size());
  for (const Regex& regex : all) nfas.push_back(NfaBuilder(regex, where).take());
  for (const Nfa& nfa : nfas)
    for (const CharSet& set : nfa.sets) sets.push_back(&set);
  if (sets.size() > 500) too_complex(where);
  std::vector<std::vector<int32_t>> classes_of;
  const std::vector<CharSet> classes = partition(sets, classes_of, b);
  std::vector<Dfa> dfas;
  size_t first_set = 0;
  for (const Nfa& nfa : nfas) {
    dfas.push_back(determinize(nfa, classes.size(), classes_of, first_set, b, where));
    first_set += nfa.sets.size();
  }

  // A state of the product: one of each automaton, then the characters so far (as far as they matter).
  std::map<std::vector<int32_t>, int32_t> known;
  std::vector<const std::vector<int32_t>*> todo;
  std::vector<std::vector<int32_t>> to;
  std::vector<bool> accepts;
  const auto add = [&](std::vector<int32_t> key) {
    const auto [it, fresh] = known.try_emplace(std::move(key), static_cast<int32_t>(to.size()));
    if (fresh) {
      if (to.size() >= kMaxStates) too_complex(where);
      to.emplace_back(classes.size(), -1);
      bool accept = it->first.back() >= min;
      for (size_t d = 0; d < dfas.size(); d++) accept = accept && item(dfas[d].accepts, it->first[d]);
      accepts.push_back(accept);
      todo.push_back(&it->first);
    }
    return it->second;
  };
  add(std::vector<int32_t>(dfas.size() + 1, 0));
  for (size_t i = 0; i < todo.size(); i++) {
    const std::vector<int32_t>& key = *todo[i];
    if (max != kUnbounded && key.back() >= max) continue;
    b.spend(classes.size());
    for (size_t c = 0; c < classes.size(); c++) {
      std::vector<int32_t> next = key;
      bool possible = true;
      for (size_t d = 0; d < dfas.size() && possible; d++) possible = (next[d] = item(dfas[d].to, key[d])[c]) >= 0;
      if (!possible) continue;
      next.back() = max == kUnbounded ? std::min(key.back() + 1, min) : key.back() + 1;
      to[i][c] = add(std::move(next));
    }
  }

  const std::vector<bool> live = live_states(to, accepts);
  if (!live[0]) return kNever;
  std::vector<NodeId> nodes(to.size(), kNever);
  for (size_t s = 0; s < to.size(); s++)
    if (live[s]) nodes[s] = b.jump();
  for (size_t s = 0; s < to.size(); s++) {
    if (!live[s]) continue;
    std::map<int32_t, CharSet> edges;
    for (size_t c = 0; c < classes.size(); c++)
      if (to[s][c] >= 0 && item(live, to[s][c])) edges[to[s][c]].add(classes[c]);
    std::vector<NodeId> choices;
    choices.reserve(edges.size() + 1);
    for (const auto& [target, set] : edges) choices.push_back(b.seq(chars.of(set), item(nodes, target)));
    if (accepts[s]) choices.push_back(kEmpty);
    b.set_jump(nodes[s], b.alt(choices));
  }
  return nodes[0];
}

}  // namespace mm::grammar
