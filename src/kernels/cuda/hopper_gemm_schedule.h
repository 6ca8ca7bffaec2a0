// Which tile, and which part of its reduction, a cluster of the Hopper GEMM computes next. Plain arithmetic from the
// experts' offsets, the same in the loading warp, the computing warps and the pass that adds the parts up; host code
// can run it too (the test walks through all clusters and looks for gaps).
//
// fwd and dgrad: the tiles (rows of the cluster x columns) are numbered expert by expert, within one by row, columns
// innermost, so that the clusters at work at one time share the rows they read; cluster c takes c, c + clusters, ...
//
// wgrad: few tiles (57 for a 4864 x 768 matrix, 256 x 256 each) but long reductions, so these are cut. Clusters at work
// at one time should be at about the same rows: what one of them reads the others then find in the L2 cache (without
// that, all clusters in different places, a grouped wgrad ran at 0.45 of the speed).
//  One problem of known length: tiles beyond a multiple of the number of clusters are cut into `groups` parts of
//  `chunk` blocks, computed at the same time by groups * tiles clusters that walk through the rows in step, and the
//  rest, shared evenly by the clusters left over, the helpers:
//          rows ->  [ chunk: cluster t ][ chunk: cluster tiles + t ] ... [ rest ]     of tile t
//  Experts (lengths known to the device alone): a unit of work is a tile of an expert, or an equal part of one if the
//  expert has more rows than a cluster's fair share of all work. Longest units first, each to the cluster that is free
//  first.
//  The part of a tile with the first rows is added to the output by the cluster itself; other parts go to a slot of
//  their own, and a second kernel adds them in the order of the rows. There are no more slots than clusters.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MM_HD __host__ __device__ __forceinline__
#else
#define MM_HD inline
#endif

namespace mm::cuda {

constexpr int kGemmBlockK = 64;  // elements of the reduction in one step

// Rows of the experts; offset null: one problem of `rows` rows.
struct ExpertRows {
  const int32_t* offset = nullptr;
  int n_expert = 1, rows = 0;
  MM_HD int begin(int e) const { return offset == nullptr ? 0 : offset[e]; }
  MM_HD int count(int e) const { return offset == nullptr ? rows : offset[e + 1] - offset[e]; }
  MM_HD int blocks(int e) const { return (count(e) + kGemmBlockK - 1) / kGemmBlockK; }
};

struct RowTile {
  int expert, row, row_end, column;  // row: the cluster's first; column in tiles
};

class RowTileWalk {
 public:
  MM_HD RowTileWalk(const ExpertRows& experts, int tile_rows, int column_tiles, int cluster, int clusters)
      : experts_(experts), tile_rows_(tile_rows), columns_(column_tiles), next_(cluster), step_(clusters) {}
  MM_HD bool next(RowTile& t) {
    for (; expert_ < experts_.n_expert; expert_++) {
      const int rows = experts_.count(expert_), tiles = (rows + tile_rows_ - 1) / tile_rows_ * columns_;
      if (next_ < base_ + tiles) {
        const int i = next_ - base_, first = experts_.begin(expert_);
        t = {expert_, first + i / columns_ * tile_rows_, first + rows, i % columns_};
        next_ += step_;
        return true;
      }
      base_ += tiles;
    }
    return false;
  }

 private:
  const ExpertRows& experts_;
  int tile_rows_, columns_, next_, step_, expert_ = 0, base_ = 0;
};

struct Segment {
  int expert, tile, begin, end;  // blocks of kGemmBlockK rows of the expert
  int slot;                      // -1: straight to the output
};

struct SegmentPlan {
  ExpertRows experts;
  int tiles = 0, clusters = 0;
  int whole = 0, groups = 0, chunk = 0, helpers = 0;  // one problem: tiles not cut, then as above

  MM_HD bool grouped() const { return experts.offset != nullptr; }
  MM_HD int cut_tiles() const { return tiles - whole; }
  MM_HD int rest() const { return experts.blocks(0) - groups * chunk; }
  MM_HD int64_t rest_cut(int helper) const { return static_cast<int64_t>(rest()) * cut_tiles() * helper / helpers; }
  MM_HD int rest_slot(int i, int helper) const { return (groups - 1) * cut_tiles() + i + helper; }
  MM_HD int slots() const {
    if (grouped()) return clusters;
    return (groups > 0 ? (groups - 1) * cut_tiles() : 0) + (helpers > 0 ? cut_tiles() + helpers : 0);
  }

  // Blocks of a cluster's fair share.
  MM_HD int fair_share() const {
    int64_t all = 0;
    for (int e = 0; e < experts.n_expert; e++) all += experts.blocks(e);
    return static_cast<int>((all * tiles + clusters - 1) / clusters);
  }
  MM_HD int parts(int e, int share) const {
    const int blocks = experts.blocks(e);
    return blocks * 8 <= share * 9 ? 1 : (blocks + share - 1) / share;
  }
};

// Cuts of one problem of `blocks` blocks a tile, for plan.tiles and plan.clusters, with helpers or without.
inline void make_dense_plan(SegmentPlan& plan, int blocks, bool with_helpers) {
  constexpr int kShortest = 8;  // blocks worth a slot
  constexpr int kChange = 6;    // a helper changes tiles often; each time takes as long as so many blocks
  const int clusters = plan.clusters;
  plan.groups = plan.chunk = plan.helpers = 0;
  plan.whole = plan.tiles / clusters * clusters;
  const int cut = plan.cut_tiles();
  if (cut == 0) return;
  plan.groups = clusters / cut;
  if (with_helpers) {
    plan.helpers = clusters - plan.groups * cut;
    plan.chunk = static_cast<int>((static_cast<int64_t>(cut) * (blocks + kChange) + clusters - 1) / clusters);
    if (plan.helpers > 0 && blocks - plan.groups * plan.chunk >= kShortest) return;
    plan.helpers = 0;
  }
  while (plan.groups > 1 &&
         (blocks / plan.groups < kShortest || (plan.groups - 1) * ((blocks + plan.groups - 1) / plan.groups) >= blocks))
    plan.groups--;
  plan.chunk = (blocks + plan.groups - 1) / plan.groups;
}

// Microseconds that a plan takes on an H100 with tiles kN = tile_n wide, fitted to measurements: a step, a change of
// tiles, and the pass that adds the slots up.
inline double plan_cost(const SegmentPlan& p, int blocks, int tile_n) {
  const double width = tile_n / 256.0, step = tile_n == 256 ? 0.70 : tile_n == 192 ? 0.585 : 0.43, change = 4 * width;
  const int cut = p.cut_tiles();
  double main = p.groups > 0 ? p.chunk * step + change : 0;
  if (p.helpers > 0) {
    const double share = static_cast<double>(cut) / p.helpers;
    const double helper = share * p.rest() * step + (share + 1) * change;
    if (helper > main) main = helper;
  }
  main += p.whole / p.clusters * (blocks * step + change);
  return main + (p.slots() > 0 ? 4 + (p.slots() + 2 * cut) * width * 0.066 : 0);
}

constexpr int kMaxUnits = 2000;  // words of shared memory for a cluster's list of units

// A tile of an expert, or part of one, in one word.
struct Unit {
  int expert, part, tile;
  static constexpr int kMaxExperts = 8, kMaxParts = 128, kMaxTiles = 2048;
  MM_HD uint32_t pack() const { return static_cast<uint32_t>((expert * kMaxParts + part) * kMaxTiles + tile); }
  MM_HD static Unit unpack(uint32_t u) {
    const int i = static_cast<int>(u);
    return {i / kMaxTiles / kMaxParts, i / kMaxTiles % kMaxParts, i % kMaxTiles};
  }
};

class SegmentWalk {
 public:
  // units: this cluster's, n_units of them (see choose_units); -1: not planned, it takes every clusters-th.
  MM_HD SegmentWalk(const SegmentPlan& plan, int cluster, const uint32_t* units, int n_units)
      : p_(plan), units_(units), n_units_(n_units), cluster_(cluster), at_(cluster) {
    if (p_.grouped()) {
      share_ = p_.fair_share();
      if (n_units >= 0) at_ = 0;
    }
  }
  MM_HD bool next(Segment& s) { return p_.grouped() ? next_unit(s) : next_part(s); }

 private:
  MM_HD bool next_unit(Segment& s) {
    Unit u;
    if (n_units_ >= 0) {
      if (at_ >= n_units_) return false;
      u = Unit::unpack(units_[at_++]);
      // Experts come in any order.
      for (; expert_ < u.expert; expert_++) slot_ += (p_.parts(expert_, share_) - 1) * p_.tiles;
      for (; expert_ > u.expert; expert_--) slot_ -= (p_.parts(expert_ - 1, share_) - 1) * p_.tiles;
    } else {
      for (;; expert_++) {
        if (expert_ == p_.experts.n_expert) return false;
        const int parts = p_.parts(expert_, share_), n = p_.experts.blocks(expert_) > 0 ? parts * p_.tiles : 0;
        if (at_ < base_ + n) break;
        base_ += n;
        slot_ += (parts - 1) * p_.tiles;
      }
      const int i = static_cast<int>(at_ - base_);
      u = {expert_, i / p_.tiles, i % p_.tiles};
      at_ += p_.clusters;
    }
    const int64_t blocks = p_.experts.blocks(u.expert), parts = p_.parts(u.expert, share_);
    s = {u.expert, u.tile, static_cast<int>(blocks * u.part / parts), static_cast<int>(blocks * (u.part + 1) / parts),
         u.part > 0 ? slot_ + (u.part - 1) * p_.tiles + u.tile : -1};
    return true;
  }
  MM_HD bool next_part(Segment& s) {
    const int blocks = p_.experts.blocks(0), cut = p_.cut_tiles(), helper = cluster_ - p_.groups * cut;
    if (at_ < p_.whole) {
      s = {0, static_cast<int>(at_), 0, blocks, -1};
      at_ += p_.clusters;
      return true;
    }
    if (cut == 0) return false;
    if (helper < 0) {
      if (rest_at_ == 0) return false;
      rest_at_ = 0;  // done after this one
      const int g = cluster_ / cut, first = g * p_.chunk;
      s = {0, p_.whole + cluster_ % cut, first, first + p_.chunk < blocks ? first + p_.chunk : blocks,
           g > 0 ? cluster_ - cut : -1};
      return true;
    }
    if (helper >= p_.helpers) return false;
    if (rest_at_ < 0) rest_at_ = p_.rest_cut(helper);
    const int64_t end = p_.rest_cut(helper + 1);
    if (rest_at_ >= end) return false;
    const int len = p_.rest(), i = static_cast<int>(rest_at_ / len), k = static_cast<int>(rest_at_ % len);
    const int n = len - k < end - rest_at_ ? len - k : static_cast<int>(end - rest_at_);
    const int first = p_.groups * p_.chunk + k;
    s = {0, p_.whole + i, first, first + n, p_.rest_slot(i, helper)};
    rest_at_ += n;
    return true;
  }

  const SegmentPlan& p_;
  const uint32_t* units_;
  int n_units_, cluster_, expert_ = 0, share_ = 0, slot_ = 0;
  int64_t at_, base_ = 0, rest_at_ = -1;
};

// The slots of one tile, in the order of the rows: `parts` of them `step` apart, then consecutive ones.
struct SlotList {
  int expert = -1;  // -1: there is no such expert
  int first = 0, step = 0, parts = 0, helper = 0, helpers = 0;
  MM_HD int count() const { return parts + helpers; }
  MM_HD int at(int i) const { return i < parts ? first + i * step : helper + i - parts; }
};

// which: of the experts that are cut, in their order; there are at most max_cut_experts.
MM_HD int max_cut_experts(const SegmentPlan& p) {
  const int n = p.clusters * 8 / (p.tiles * 9);  // each has more than 9/8 of a fair share
  return !p.grouped() ? 1 : n < p.experts.n_expert ? n : p.experts.n_expert;
}
MM_HD SlotList slots_of(const SegmentPlan& p, int tile, int which) {
  SlotList list;
  if (p.grouped()) {
    const int share = p.fair_share();
    int before = 0;
    for (int e = 0; e < p.experts.n_expert; e++) {
      const int parts = p.parts(e, share);
      if (parts > 1 && which-- == 0) {
        list.expert = e, list.first = before + tile, list.step = p.tiles, list.parts = parts - 1;
        return list;
      }
      before += (parts - 1) * p.tiles;
    }
    return list;
  }
  list.expert = 0;
  const int i = tile - p.whole, cut = p.cut_tiles();
  if (i < 0) return list;
  list.first = i, list.step = cut, list.parts = p.groups - 1;
  if (p.helpers > 0) {
    // Helper r has the blocks of the line from rest_cut(r) on: which has the tile's first block, which its last?
    const int64_t all = static_cast<int64_t>(p.rest()) * cut, first = static_cast<int64_t>(p.rest()) * i;
    const auto helper_at = [&](int64_t x) { return static_cast<int>(((x + 1) * p.helpers + all - 1) / all) - 1; };
    const int from = helper_at(first), to = helper_at(first + p.rest() - 1);
    list.helper = p.rest_slot(i, from), list.helpers = to - from + 1;
  }
  return list;
}

}  // namespace mm::cuda
