// Which tile, and which part of its reduction, a cluster of the Hopper GEMM computes next. Plain arithmetic from the
// experts' offsets, the same in the loading warp, the computing warps and the pass that adds the parts up; host code can
// run it too (the test walks through all clusters and looks for gaps).
//
// fwd and dgrad: the tiles (rows of the cluster x columns) are numbered expert by expert, within one by row, columns
// innermost, so that the clusters at work at one time share the rows they read; cluster c takes c, c + clusters, ...
//
// wgrad: few tiles (57 for a 4864 x 768 matrix, 256 x 256 each) but long reductions, so these are cut.
//  One problem of known length (groups > 0): each tile's reduction is cut into `groups` parts of `chunk` blocks, computed
//  at the same time by groups * tiles clusters that walk through the rows in step (what one reads the other finds in
//  the L2 cache), and the rest, shared evenly by the clusters left over:
//          rows ->  [ chunk: cluster t ][ chunk: cluster tiles + t ] ... [ rest ]     of tile t
//  Otherwise (groups = 0): all blocks of all tiles of all experts in one line, cut into equal pieces, one a cluster. A
//  cluster's piece then begins within a tile, covers some whole ones and ends within another.
//  The part of a tile with the first rows is added to the output by the cluster itself; other parts go to a slot of
//  their own, and a second kernel adds them in the order of the rows.
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
  ExpertRows experts_;
  int tile_rows_, columns_, next_, step_, expert_ = 0, base_ = 0;
};

struct Segment {
  int expert, tile, begin, end;  // blocks of kGemmBlockK rows of the expert
  int slot;                      // -1: straight to the output
};

struct SegmentPlan {
  ExpertRows experts;
  int tiles = 0, clusters = 0, groups = 0, chunk = 0;

  MM_HD int64_t total() const {
    int64_t n = 0;
    for (int e = 0; e < experts.n_expert; e++) n += experts.blocks(e);
    return n * tiles;
  }
  // groups = 0: where cluster c's piece begins. Cuts closer than kSnap blocks to a tile's end are moved there: adding a
  // tile up costs more than computing so little of it.
  MM_HD int64_t cut(int c, int64_t all) const {
    constexpr int kSnap = 4;
    const int64_t at = all * c / clusters;
    int64_t base = 0;
    for (int e = 0; e < experts.n_expert; e++) {
      const int blocks = experts.blocks(e);
      const int64_t size = static_cast<int64_t>(blocks) * tiles;
      if (at < base + size) {
        const int k = static_cast<int>((at - base) % blocks);
        return k < kSnap ? at - k : blocks - k < kSnap ? at + blocks - k : at;
      }
      base += size;
    }
    return all;
  }
  // groups > 0: the rest of all tiles is one line, shared by the clusters left over.
  MM_HD int rest() const { return experts.blocks(0) - groups * chunk; }
  MM_HD int rest_clusters() const { return clusters - groups * tiles; }
  MM_HD int64_t rest_cut(int r) const { return static_cast<int64_t>(rest()) * tiles * r / rest_clusters(); }
  MM_HD int rest_slot(int tile, int r) const { return (groups - 1) * tiles + tile + r; }
  MM_HD int slots() const {
    if (groups == 0) return clusters;
    return (groups - 1) * tiles + (rest_clusters() > 0 ? tiles + rest_clusters() : 0);
  }
};

class SegmentWalk {
 public:
  MM_HD SegmentWalk(const SegmentPlan& plan, int cluster) : p_(plan), cluster_(cluster) {
    if (p_.groups == 0) {
      const int64_t all = p_.total();
      at_ = p_.cut(cluster, all), end_ = p_.cut(cluster + 1, all);
    } else if (const int r = cluster - p_.groups * p_.tiles; r >= 0) {
      at_ = p_.rest_cut(r), end_ = p_.rest_cut(r + 1);
    } else {
      at_ = 0, end_ = 1;
    }
  }
  MM_HD bool next(Segment& s) {
    if (at_ >= end_) return false;
    if (p_.groups == 0) {
      int blocks = p_.experts.blocks(expert_);
      while (at_ >= base_ + static_cast<int64_t>(blocks) * p_.tiles) {
        base_ += static_cast<int64_t>(blocks) * p_.tiles;
        blocks = p_.experts.blocks(++expert_);
      }
      const int i = static_cast<int>(at_ - base_), tile = i / blocks, k = i % blocks;
      const int n = blocks - k < end_ - at_ ? blocks - k : static_cast<int>(end_ - at_);
      s = {expert_, tile, k, k + n, k > 0 ? cluster_ : -1};
      at_ += n;
    } else if (const int r = cluster_ - p_.groups * p_.tiles; r >= 0) {
      const int len = p_.rest(), tile = static_cast<int>(at_) / len, k = static_cast<int>(at_) % len;
      const int n = len - k < end_ - at_ ? len - k : static_cast<int>(end_ - at_), first = p_.groups * p_.chunk + k;
      s = {0, tile, first, first + n, p_.rest_slot(tile, r)};
      at_ += n;
    } else {
      const int g = cluster_ / p_.tiles, blocks = p_.experts.blocks(0), first = g * p_.chunk;
      const int last = first + p_.chunk < blocks ? first + p_.chunk : blocks;
      s = {0, cluster_ % p_.tiles, first, last, g > 0 ? cluster_ - p_.tiles : -1};
      at_ = end_;
    }
    return true;
  }

 private:
  SegmentPlan p_;
  int cluster_, expert_ = 0;
  int64_t at_ = 0, end_ = 0, base_ = 0;
};

// The slots of one tile of one expert, in the order of the rows: calls f(slot).
template <class F>
MM_HD void for_slots(const SegmentPlan& p, int expert, int tile, F&& f) {
  if (p.groups == 0) {
    int64_t first = 0;
    for (int e = 0; e < expert; e++) first += static_cast<int64_t>(p.experts.blocks(e)) * p.tiles;
    const int blocks = p.experts.blocks(expert);
    if (blocks == 0) return;
    first += static_cast<int64_t>(tile) * blocks;
    const int64_t last = first + blocks, all = p.total();
    int c = static_cast<int>(first * p.clusters / all) - 1;
    for (c = c < 0 ? 0 : c; c < p.clusters; c++) {
      const int64_t at = p.cut(c, all);
      if (at >= last) return;
      // Two clusters may begin at one place when there is less work than clusters: the last of them has it.
      if (at > first && p.cut(c + 1, all) > at) f(c);
    }
    return;
  }
  for (int g = 1; g < p.groups; g++) f((g - 1) * p.tiles + tile);
  if (p.rest_clusters() <= 0) return;
  const int64_t len = p.rest(), first = len * tile;
  for (int r = 0; r < p.rest_clusters(); r++) {
    const int64_t from = p.rest_cut(r), to = p.rest_cut(r + 1);
    if (from < first + len && to > first && to > from) f(p.rest_slot(tile, r));
  }
}

}  // namespace mm::cuda
