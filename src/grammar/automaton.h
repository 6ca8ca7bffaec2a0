// A graph made deterministic while it is used, for one vocabulary. A place in a text is a set of stacks of expressions
// still to be matched (what partial derivatives leave); equal stacks, sets and their masks are kept, so that a place
// seen before costs a look-up. Shared by all texts of a grammar; every method may be called by any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"
#include "grammar/graph.h"

namespace mm::grammar {

class Automaton {
 public:
  using State = int32_t;
  static constexpr State kDead = 0;

  Automaton(const Graph& graph, TokenTable table);  // the graph must outlive it
  const TokenTable& table() const { return table_; }

  State start();
  State step(State state, std::string_view bytes);   // kDead if they are not allowed
  void mask(State state, std::span<uint32_t> bits);  // tokens that may come; none where the work limit is hit
  bool complete(State state);                        // the text may end here
  bool finished(State state);                        // and nothing else
  // Enough is kept: continue in a new one, which takes over the place of a text.
  bool full() const { return full_.load(std::memory_order_relaxed); }
  State adopt(Automaton& other, State state);

 private:
  // A stack: an expression, with the passes done if it is a repeat, and the stack below.
  struct Cell {
    NodeId node;
    int32_t count;
    int32_t next;                   // kEndCell: nothing
    uint32_t shape;                 // hash of the expressions, without the passes that change little: see dominates()
    uint8_t levels;                 // containers open
    bool may_end;                   // all of the stack matches the empty text
    uint32_t seen = 0, passed = 0;  // the round of expand() that met it
  };
  struct Place {
    uint32_t first, size;  // of members_
    bool may_end;
    int32_t row = -1;   // of rows_, once expanded
    int32_t mask = -1;  // of masks_
  };
  struct Move {
    int32_t set, target;
  };
  static constexpr int32_t kEndCell = 0, kNoCell = -1;

  int32_t cell(NodeId node, int32_t count, int32_t next);  // kNoCell if more than kMaxLevels would be open
  bool head_may_be_empty(const Cell& cell) const;
  bool before(int32_t a, int32_t b) const;        // the order of members: those of one shape lie together
  bool dominates(int32_t a, int32_t b) const;     // whatever b matches, a matches too
  void add_target(int32_t target);                // unless it adds nothing
  State place(std::span<const int32_t> members);  // ordered, unique
  bool expand(State state);                       // false: too much work
  void visit(NodeId node, int32_t count, int32_t next);
  void fill_row(int32_t row);
  State next_state(State state, uint8_t byte);  // expands if need be; -1: too much work
  State representative(State state);            // one of those with the same mask
  bool walk(State state, uint32_t* bits);
  void account();

  const Graph& graph_;
  const TokenTable table_;
  std::mutex mutex_;
  std::atomic<bool> full_ = false;

  std::vector<Cell> cells_;
  std::vector<int32_t> cell_slots_;  // open hashing
  std::vector<Place> places_;
  std::vector<int32_t> place_slots_;
  std::vector<int32_t> members_;
  std::vector<State> rows_;
  std::vector<uint32_t> masks_;

  uint32_t round_ = 0;
  size_t work_ = 0, work_limit_ = 0;  // expressions visited, for a mask or a byte
  std::vector<Move> moves_;
  std::vector<int32_t> todo_, targets_;
  std::vector<State> trail_;
};

}  // namespace mm::grammar
