// What the host plans for the persistent decode step: which block computes which rows, and what lies where in shared
// memory.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/cuda/decode_persistent.cuh"

namespace mm::cuda::persistent {

inline constexpr size_t align_up(size_t x, size_t a) { return (x + a - 1) / a * a; }

// --- dealing out --------------------------------------------------------------------------------------------------
// Every stage's tiles go to the blocks (but the first `without`) in runs of equal length or one more; the longer ones
// to those with the least to copy so far.
struct Deal {
  std::vector<int2> segments;         // [grid][n_segment]
  std::vector<uint32_t> block_begin;  // [grid + 1]
  std::vector<uint32_t> tile_begin;   // of all segments, one after another
  std::vector<size_t> segment_tiles;  // where each segment's tiles begin in tile_begin
};

inline Deal deal_out(int grid, int without, const std::vector<int>& tiles, const std::vector<int>& units) {
  const size_t n_segment = tiles.size(), blocks = static_cast<size_t>(grid),
               workers = blocks - static_cast<size_t>(without);
  Deal d;
  d.segments.resize(blocks * n_segment);
  std::vector<int64_t> load(blocks, 0);
  std::vector<size_t> order(blocks);
  for (size_t s = 0; s < n_segment; s++) {
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return load[a] < load[b]; });
    const size_t n = static_cast<size_t>(tiles[s]);
    std::vector<int> count(blocks, static_cast<int>(n / workers));
    for (size_t b = 0; b < blocks - workers; b++) count[b] = 0;
    for (size_t i = 0, left = n % workers; left > 0; i++) {
      if (order[i] < blocks - workers) continue;
      count[order[i]]++, left--;
    }
    int first = 0;
    for (size_t b = 0; b < blocks; b++) {
      d.segments[b * n_segment + s] = make_int2(first, count[b]);
      first += count[b];
      load[b] += int64_t{count[b]} * units[s];
    }
  }
  size_t all = 0;
  for (size_t s = 0; s < n_segment; s++) {
    d.segment_tiles.push_back(all);
    all += static_cast<size_t>(tiles[s]);
  }
  d.tile_begin.resize(all);
  uint32_t at = 0;
  for (size_t b = 0; b < blocks; b++) {
    d.block_begin.push_back(at);
    for (size_t s = 0; s < n_segment; s++) {
      const int2 run = d.segments[b * n_segment + s];
      for (int i = 0; i < run.y; i++) {
        d.tile_begin[d.segment_tiles[s] + static_cast<size_t>(run.x + i)] = at;
        at += static_cast<uint32_t>(units[s]);
      }
    }
  }
  d.block_begin.push_back(at);
  return d;
}

// --- shared memory ------------------------------------------------------------------------------------------------
// Shared memory of a step with one row: the ring, then the rest.
inline SharedPlan plan_row(const Params& p) {
  SharedPlan s = {};
  int at = alone_bytes;
  const auto piece = [&](int bytes) { return at -= (bytes + 127) / 128 * 128; };
  s.bytes = alone_bytes;
  s.full = piece(8 * row_barriers), s.passes = piece(static_cast<int>(sizeof(RowPass)) * p.n_pass);
  s.part = piece(2 * row_part_bytes), s.sums = piece(2 * n_warp * static_cast<int>(sizeof(float)));
  s.ring = at;
  return s;
}

// The passes of a step with one row. ring: bytes.
inline std::vector<RowPass> plan_passes(const Deal& deal, const std::vector<int>& units, WeightFormat format,
                                        uint32_t ring, size_t block) {
  const RowPass end = {
      .from = 0, .bytes = 0, .to = 0, .after = 0xffffffffu, .stage = -1, .first_tile = 0, .tiles = 0, .unused = 0};
  std::vector<RowPass> all;
  uint32_t from = 0, to = 0;
  for (size_t s = 0; s < units.size(); s++) {
    const int2 run = deal.segments[block * units.size() + s];
    const int most = s % 4 == stage_down ? 1 : row_tiles(format, units[s]);  // 4 n_layer is the head
    for (int done = 0; done < run.y; done += most) {
      RowPass x = end;
      x.stage = static_cast<int>(s), x.first_tile = run.x + done, x.tiles = std::min(most, run.y - done);
      x.from = from, x.bytes = static_cast<uint32_t>(x.tiles * units[s] * unit_bytes(format));
      x.to = to + x.bytes <= ring ? to : 0;
      x.after = all.size() < row_barriers ? 0 : static_cast<uint32_t>(all.size()) - row_barriers + 1;
      for (size_t k = all.size(); k-- > x.after;) {  // the last pass that lies where this one goes
        if (all[k].to < x.to + x.bytes && x.to < all[k].to + all[k].bytes) {
          x.after = static_cast<uint32_t>(k) + 1;
          break;
        }
      }
      if (!all.empty()) x.after = std::max(x.after, all.back().after);
      from += x.bytes, to = x.to + x.bytes;
      all.push_back(x);
    }
  }
  all.push_back(end);
  return all;
}

// Shared memory for n_tok tokens; what is left is the ring. False where that is too small.
inline bool plan_shared(Params& p, WeightFormat format, int limit) {
  SharedPlan& s = p.smem;
  if (p.roles) {
    s = plan_row(p);
    return true;
  }
  int k_max = 0;
  for (const StageShape& shape : p.shape) k_max = std::max(k_max, shape.k);
  const int size = p.kv_format == KvFormat::i8 ? 1 : 2;
  s.input_stride = 2 * k_max + (2 * k_max % 128 == 0 ? 64 : 0);
  for (s.held = held_units; s.held >= 1; s.held--) {
    int tiles = 1, pass = 0;
    for (const StageShape& shape : p.shape) {
      const int n = tiles_per_pass(shape.units, s.held);
      if (n < 1) return false;
      tiles = std::max(tiles, n), pass = std::max(pass, n * shape.units);
    }
    const int part = 4 * std::max(tiles * 8 * p.n_tok * (2 * n_warp + 4), n_warp * (p.d_head + 2));
    size_t at = 0;
    const auto piece = [&](size_t bytes) {
      const size_t begin = at;
      at = align_up(at + bytes, 128);
      return static_cast<int>(begin);
    };
    const int slot_bytes = slot_units * unit_bytes(format);
    const auto rest = [&] {
      s.full = piece(8 * 64);
      s.segments = piece(sizeof(int2) * static_cast<size_t>(4 * p.n_layer + 1));
      s.residual = piece(static_cast<size_t>(4 * p.n_tok * p.d_model));
      s.input = piece(static_cast<size_t>(p.n_tok * s.input_stride));
      s.part = piece(static_cast<size_t>(part));
      s.sums = piece(static_cast<size_t>(4 * p.n_tok * p.sum_stride));
      s.q = piece(static_cast<size_t>(8 * (2 * p.d_head + 16)));
      s.own = piece(static_cast<size_t>(2 * p.d_head * size + 8));
      s.ml = piece(4 * 8 * 2 * 4);
      s.scores = piece(8 * score_pitch);
      s.rows = piece(4 * 2 * keys_per_round);
      s.rope = piece(static_cast<size_t>(4 * p.d_head));
      s.kv_ring = piece(static_cast<size_t>(2 * kv_round_bytes(p.d_head, size)));
    };
    rest();
    s.n_slots = std::min(64, (limit - static_cast<int>(at)) / slot_bytes);
    if (s.n_slots * slot_units < pass + 2 * slot_units) continue;
    at = 0;
    piece(static_cast<size_t>(s.n_slots * slot_bytes));
    rest();
    s.bytes = static_cast<int>(at);
    for (StageShape& shape : p.shape) shape.tiles_per_pass = tiles_per_pass(shape.units, s.held);
    return s.bytes <= limit;
  }
  return false;
}

}  // namespace mm::cuda::persistent
