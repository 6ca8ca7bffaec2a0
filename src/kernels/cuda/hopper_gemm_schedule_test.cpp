// The order of work of the Hopper GEMM, walked through on the CPU: every block of every tile exactly once, parts in
// slots of their own that the adding pass finds in the order of the rows.
#include "kernels/cuda/hopper_gemm_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace mm::cuda {

namespace {

using Rng = std::mt19937;

int below(Rng& rng, int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }

std::vector<int32_t> random_offsets(Rng& rng, int n_expert) {
  std::vector<int32_t> offset{0};
  for (int e = 0; e < n_expert; e++)
    offset.push_back(offset.back() +
                     std::array{below(rng, 100), 0, below(rng, 6000), 64}[static_cast<size_t>(below(rng, 4))]);
  return offset;
}

void check_plan(const SegmentPlan& p, const std::vector<std::vector<uint32_t>>& units) {
  std::map<std::pair<int, int>, std::vector<Segment>> tiles;
  std::set<int> used;
  for (int c = 0; c < p.clusters; c++) {
    const auto* own = units.empty() ? nullptr : &units[static_cast<size_t>(c)];
    SegmentWalk walk(p, c, own == nullptr ? nullptr : own->data(), own == nullptr ? -1 : static_cast<int>(own->size()));
    for (Segment s{}; walk.next(s);) {
      ASSERT_LT(s.begin, s.end);
      if (s.slot >= 0) {
        ASSERT_TRUE(used.insert(s.slot).second);
        ASSERT_LT(s.slot, p.slots());
      }
      tiles[{s.expert, s.tile}].push_back(s);
    }
  }
  int cut_experts = 0;
  for (int e = 0; e < p.experts.n_expert; e++) {
    const bool cut = !p.grouped() || p.parts(e, p.fair_share()) > 1;
    for (int t = 0; t < p.tiles; t++) {
      auto& segments = tiles[{e, t}];
      std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
      int at = 0;
      std::vector<int> slots, found;
      for (const Segment& s : segments) {
        ASSERT_EQ(s.begin, at);
        ASSERT_EQ(s.slot < 0, s.begin == 0);
        if (s.slot >= 0) slots.push_back(s.slot);
        at = s.end;
      }
      ASSERT_EQ(at, p.experts.blocks(e));
      if (cut) {
        const SlotList list = slots_of(p, t, p.grouped() ? cut_experts : 0);
        ASSERT_EQ(list.expert, e);
        for (int i = 0; i < list.count(); i++) found.push_back(list.at(i));
      }
      ASSERT_EQ(found, slots);
    }
    cut_experts += cut;
  }
  ASSERT_LE(cut_experts, max_cut_experts(p));
}

}  // namespace

TEST(HopperGemmSchedule, EveryRowTileOnce) {
  Rng rng(1);
  for (int round = 0; round < 300; round++) {
    const int n_expert = 1 + below(rng, 6), columns = 1 + below(rng, 9), clusters = 1 + below(rng, 66);
    const std::vector<int32_t> offset = random_offsets(rng, n_expert);
    const ExpertRows experts{offset.data(), n_expert, offset.back()};
    std::set<std::array<int, 3>> seen;
    for (int c = 0; c < clusters; c++) {
      RowTileWalk walk(experts, 256, columns, c, clusters);
      for (RowTile t{}; walk.next(t);) {
        ASSERT_TRUE(seen.insert({t.expert, t.row, t.column}).second);
        ASSERT_LT(t.row, t.row_end);
        ASSERT_EQ(t.row_end, offset[static_cast<size_t>(t.expert) + 1]);
      }
    }
    size_t wanted = 0;
    for (int e = 0; e < n_expert; e++) wanted += static_cast<size_t>((experts.count(e) + 255) / 256 * columns);
    ASSERT_EQ(seen.size(), wanted);
  }
}

TEST(HopperGemmSchedule, EveryBlockOfOneProblemOnce) {
  Rng rng(2);
  for (int round = 0; round < 1000; round++) {
    const int rows = 1 + below(rng, 30000);
    SegmentPlan p;
    p.experts = {nullptr, 1, rows};
    p.tiles = 1 + below(rng, 150);
    p.clusters = 1 + below(rng, 80);
    make_dense_plan(p, p.experts.blocks(0), round % 2 == 0);
    EXPECT_LE(p.slots(), p.clusters);
    EXPECT_GT(plan_cost(p, p.experts.blocks(0), 256), 0);
    check_plan(p, {});
  }
}

TEST(HopperGemmSchedule, EveryBlockOfAllExpertsOnce) {
  Rng rng(3);
  for (int round = 0; round < 1000; round++) {
    const int n_expert = 1 + below(rng, 7);
    const std::vector<int32_t> offset = random_offsets(rng, n_expert);
    SegmentPlan p;
    p.experts = {offset.data(), n_expert, offset.back()};
    p.tiles = 1 + below(rng, 150);
    p.clusters = 1 + below(rng, 80);
    std::vector<std::vector<uint32_t>> units;
    if (round % 2 == 0) {  // dealt out anyhow
      units.resize(static_cast<size_t>(p.clusters));
      for (int e = 0; e < n_expert; e++) {
        const int n = p.experts.blocks(e) == 0 ? 0 : p.parts(e, p.fair_share()) * p.tiles;
        for (int i = 0; i < n; i++) {
          const Unit u{e, i / p.tiles, i % p.tiles};
          ASSERT_EQ(Unit::unpack(u.pack()).part, u.part);
          units[static_cast<size_t>(below(rng, p.clusters))].push_back(u.pack());
        }
      }
      for (auto& own : units) std::shuffle(own.begin(), own.end(), rng);
    }
    check_plan(p, units);
  }
}

}  // namespace mm::cuda
