#include "grammar/grammar.h"

#include <mutex>

#include "base/error.h"
#include "grammar/automaton.h"
#include "grammar/json_nodes.h"
#include "grammar/json_schema.h"
#include "grammar/regex.h"

namespace mm {

using grammar::Automaton;
using grammar::GraphBuilder;
using grammar::NodeId;

struct Grammar::Impl {
  explicit Impl(grammar::Graph g) : graph(std::move(g)) {}

  // The automaton for a vocabulary: what texts of this grammar learned about it is shared. A full one makes way.
  std::shared_ptr<Automaton> automaton(const TokenTable& table) const {
    const std::lock_guard lock(mutex);
    for (auto& known : automata) {
      if (&known->table().impl() != &table.impl()) continue;
      if (known->full()) known = std::make_shared<Automaton>(graph, table);
      return known;
    }
    if (automata.size() >= 4) automata.erase(automata.begin());  // vocabularies are few
    return automata.emplace_back(std::make_shared<Automaton>(graph, table));
  }

  const grammar::Graph graph;
  mutable std::mutex mutex;
  mutable std::vector<std::shared_ptr<Automaton>> automata;
};

namespace {

std::shared_ptr<const Grammar> make(grammar::Graph graph) {
  return std::make_shared<const Grammar>(std::make_unique<Grammar::Impl>(std::move(graph)));
}

}  // namespace

Grammar::Grammar(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Grammar::~Grammar() = default;

std::shared_ptr<const Grammar> Grammar::regex(std::string_view pattern, const std::string& where) {
  GraphBuilder b(where);
  const auto expression = grammar::parse_regex(pattern, grammar::RegexMatch::whole, where);
  grammar::CharNodes chars(b, grammar::CharEncoding::utf8);
  return make(b.finish(grammar::regex_node(chars, expression)));
}

std::shared_ptr<const Grammar> Grammar::json_schema(const ordered_json& schema, const std::string& where) {
  return schema.is_null() ? json_object() : make(grammar::compile_schema(schema, where));
}

std::shared_ptr<const Grammar> Grammar::json_object() {
  static const std::shared_ptr<const Grammar> any = [] {
    GraphBuilder b("json_object");
    return make(b.finish(grammar::JsonNodes(b).any_object()));
  }();
  return any;
}

std::shared_ptr<const Grammar> Grammar::sequence(const std::vector<std::shared_ptr<const Grammar>>& parts) {
  GraphBuilder b("sequence of grammars");
  NodeId all = grammar::kEmpty;
  for (size_t i = parts.size(); i-- > 0;) all = b.seq(b.import(parts[i]->impl().graph), all);
  return make(b.finish(all));
}

std::shared_ptr<const Grammar> Grammar::alternatives(const std::vector<std::shared_ptr<const Grammar>>& parts) {
  GraphBuilder b("alternative grammars");
  std::vector<NodeId> choices;
  choices.reserve(parts.size());
  for (const auto& part : parts) choices.push_back(b.import(part->impl().graph));
  return make(b.finish(b.alt(choices)));
}

std::shared_ptr<const Grammar> Grammar::literal(std::string_view text) {
  GraphBuilder b("literal text");
  return make(b.finish(b.literal(text)));
}

struct GrammarState::Impl {
  // Moves to a new automaton when the old one keeps too much.
  Automaton& current() {
    if (automaton->full()) {
      auto fresh = grammar->impl().automaton(table);
      if (fresh != automaton) {
        state = fresh->adopt(*automaton, state);
        automaton = std::move(fresh);
      }
    }
    return *automaton;
  }

  std::shared_ptr<const Grammar> grammar;
  TokenTable table;
  std::shared_ptr<Automaton> automaton;
  Automaton::State state;
};

GrammarState::GrammarState(std::shared_ptr<const Grammar> grammar, TokenTable table) {
  MM_CHECK(grammar != nullptr);
  auto automaton = grammar->impl().automaton(table);
  const auto start = automaton->start();
  impl_ = std::make_unique<Impl>(Impl{std::move(grammar), std::move(table), std::move(automaton), start});
}

GrammarState::GrammarState(const GrammarState& other) : impl_(std::make_unique<Impl>(*other.impl_)) {}
GrammarState& GrammarState::operator=(const GrammarState& other) {
  impl_ = std::make_unique<Impl>(*other.impl_);
  return *this;
}
GrammarState::GrammarState(GrammarState&&) noexcept = default;
GrammarState::~GrammarState() = default;

void GrammarState::mask(std::span<uint32_t> bits, std::span<const int32_t> stop_ids) const {
  const int64_t n_vocab = impl_->table.size();
  MM_CHECK(static_cast<int64_t>(bits.size()) == (n_vocab + 31) / 32, "{} words for {} tokens", bits.size(), n_vocab);
  Automaton& automaton = impl_->current();
  automaton.mask(impl_->state, bits);
  const bool may_end = automaton.complete(impl_->state);
  for (const int32_t id : stop_ids) {
    if (id < 0 || id >= n_vocab) continue;  // can never come
    const uint32_t bit = 1u << (id % 32);
    if (may_end) bits[static_cast<size_t>(id / 32)] |= bit;
    else bits[static_cast<size_t>(id / 32)] &= ~bit;
  }
}

bool GrammarState::accept(int32_t id) {
  if (id < 0 || id >= impl_->table.size() || impl_->table.bytes(id).empty()) return false;
  Automaton& automaton = impl_->current();
  const auto next = automaton.step(impl_->state, impl_->table.bytes(id));
  if (next == Automaton::kDead) return false;
  impl_->state = next;
  return true;
}

bool GrammarState::complete() const { return impl_->automaton->complete(impl_->state); }
bool GrammarState::finished() const { return impl_->automaton->finished(impl_->state); }

}  // namespace mm
