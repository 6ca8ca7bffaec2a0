// Products of the inference step: operands, and the two ways through the packed weights. Few rows: every panel streams
// once through registers ("few" kernels; bytes bound). Many rows: 32 rows x 2 panels at a time ("many" kernels), int8
// panels expanded to bf16 once for all rows.
#include <cstring>

#include "kernels/cpu/infer_worker.h"

namespace mm::cpu {

OperandKind Worker::kind_for(const InferMatrix& w, int64_t rows) const {
  if (w.format == WeightFormat::f32) return OperandKind::f32;
  if (w.format == WeightFormat::i8 && !s_.invariant && rows <= k_.few_rows_i8) return OperandKind::q8;
  return OperandKind::bf16;
}

bool Worker::use_few(const Operand& x, int64_t rows) const {
  if (x.kind == OperandKind::q8) return true;
  return !s_.invariant && rows <= k_.few_rows_bf16;
}

void Worker::put_cols(const Operand& to, int64_t r, int64_t begin, int64_t n, const float* x) const {
  switch (to.kind) {
    case OperandKind::f32: std::memcpy(to.f32(r) + begin, x, static_cast<size_t>(n) * 4); break;
    case OperandKind::bf16: k_.put_bf16(to.bf16(r), x, begin, n); break;
    case OperandKind::q8: k_.put_q8(to.q8(r), x, begin, n, to.kp); break;
  }
}

void Worker::finish_row(const Operand& to, int64_t r) const {
  const int64_t end = round_up(to.k, 32);
  if (end == to.kp || to.kind == OperandKind::f32) return;
  const float zeros[32] = {};
  put_cols(to, r, end, 32, zeros);
}

void Worker::put_row(const Operand& to, int64_t r, const float* x) const {
  put_cols(to, r, 0, to.k, x);
  finish_row(to, r);
}

// Bytes of the next product's weights that a thread asks for while it waits, at most.
static constexpr int64_t asked_in_barriers = 65536;

WeightStream Worker::stream_to(const InferMatrix& w, int64_t end_panel, const InferMatrix* next) const {
  const char* end = static_cast<const char*>(w.data) + end_panel * panel_bytes(w.format, w.k);
  if (next == nullptr) return {end, static_cast<const char*>(w.data)};
  // Of gate and up rows side by side the thread begins with the first half.
  const int64_t first =
      next->n == 2 * m_.d_ff && next->n % 64 == 0 ? 2 * begin_of(next->n / 64) : begin_of(panels_of(next->n));
  return {end, static_cast<const char*>(next->data) + first * panel_bytes(next->format, next->k)};
}

void Worker::follow(const WeightStream& stream) {
  soon_ = stream.next + infer_ahead;
  soon_end_ = soon_ + asked_in_barriers;
}

void Worker::few(float* c, const Operand& x, int64_t row0, int64_t rows, const InferMatrix& w, int64_t panel,
                 int64_t panels, const WeightStream& stream) const {
  const char* at = static_cast<const char*>(w.data) + panel * panel_bytes(w.format, w.k);
  switch (x.kind) {
    case OperandKind::f32:
      k_.few_f32(c, few_columns, reinterpret_cast<const float*>(at), w.k, panels, x.f32(row0), w.k, rows, stream);
      break;
    case OperandKind::bf16:
      if (w.format == WeightFormat::i8) {  // rows of a group of experts: too few for many, operands are bf16 already
        for (int64_t p = 0; p < panels; p++) {
          k_.expand_i8(b_.tiles, reinterpret_cast<const uint8_t*>(at) + p * panel_bytes(w.format, w.k), x.kp);
          k_.few_bf16(c + p * infer_panel, few_columns, b_.tiles, x.kp, 1, x.bf16(row0), rows, {at, at});
        }
      } else {
        k_.few_bf16(c, few_columns, reinterpret_cast<const uint16_t*>(at), x.kp, panels, x.bf16(row0), rows, stream);
      }
      break;
    case OperandKind::q8:
      k_.few_i8(c, few_columns, reinterpret_cast<const uint8_t*>(at), x.kp, panels, x.q8(row0), x.row_bytes(), rows,
                stream);
      break;
  }
}

// Panels as the "many" kernels take them: int8 ones expanded into place `slot` of this thread's tiles.
const uint16_t* Worker::expanded(const InferMatrix& w, int64_t panel, int64_t panels, int64_t slot) const {
  const char* at = static_cast<const char*>(w.data) + panel * panel_bytes(w.format, w.k);
  if (w.format != WeightFormat::i8) return reinterpret_cast<const uint16_t*>(at);
  uint16_t* to = b_.tiles + slot * infer_panel * padded_k(w.k);
  for (int64_t p = 0; p < panels; p++) {
    k_.expand_i8(to + p * infer_panel * padded_k(w.k),
                 reinterpret_cast<const uint8_t*>(at) + p * panel_bytes(w.format, w.k), padded_k(w.k));
  }
  return to;
}

void Worker::many(float* c, const Operand& x, int64_t row0, int64_t rows, int64_t panels, const uint16_t* tiles,
                  const uint16_t* next) const {
  if (x.kind == OperandKind::f32) {
    const auto* b = reinterpret_cast<const float*>(tiles);
    k_.many_f32(c, x.f32(row0), x.k, x.k, rows, b, panels > 1 ? b + x.k * infer_panel : nullptr);
  } else {
    k_.many_bf16(c, x.bf16(row0), x.kp, rows, tiles, panels > 1 ? tiles + x.kp * infer_panel : nullptr, next);
  }
}

// So many rows of an operand stay in L2 while the panels pass, a multiple of 32: with 512 rows of 2,432 terms (2.5 MB)
// the products ran at 1.1 TFLOP/s a core, with 256 at 2.2.
static int64_t rows_of_l2(const Operand& x) {
  constexpr int64_t bytes = 5 << 18;
  const int64_t row = x.kind == OperandKind::f32 ? x.k * 4 : x.kp * 2;
  return std::max<int64_t>(64, bytes / row / 32 * 32);
}

// The two panels behind those at `tiles`, where the product reads the weights as they lie.
const uint16_t* Worker::behind(const InferMatrix& w, const uint16_t* tiles) const {
  return w.format == WeightFormat::bf16 ? tiles + 2 * infer_panel * padded_k(w.k) : nullptr;
}

void Worker::product(const Operand& x, int64_t row0, int64_t rows, const InferMatrix& w, float* out, int64_t ldo,
                     bool add, const InferMatrix* next) {
  // Rows [r0, r0 + n_row) of columns from col0 on, staged in b_.c.
  const auto deliver = [&](int64_t r0, int64_t n_row, int64_t col0, int64_t n_col, int64_t ldc) {
    n_col = std::min(n_col, w.n - col0);
    for (int64_t r = 0; r < n_row; r++) {
      float* to = out + (r0 + r) * ldo + col0;
      if (add) k_.add(to, b_.c + r * ldc, n_col);
      else std::memcpy(to, b_.c + r * ldc, static_cast<size_t>(n_col) * 4);
    }
  };
  if (use_few(x, rows)) {
    const int64_t end = end_of(panels_of(w.n));
    const WeightStream stream = stream_to(w, end, next);
    for (int64_t p = begin_of(panels_of(w.n)); p < end; p += few_panels) {
      const int64_t panels = std::min(few_panels, end - p);
      few(b_.c, x, row0, rows, w, p, panels, stream);
      deliver(0, rows, p * infer_panel, panels * infer_panel, few_columns);
    }
    if (next != nullptr) follow(stream);
    return;
  }
  const int64_t pairs = (panels_of(w.n) + 1) / 2, block = rows_of_l2(x);
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    for (int64_t pair = begin_of(pairs); pair < end_of(pairs); pair++) {
      const int64_t panels = std::min<int64_t>(2, panels_of(w.n) - 2 * pair);
      const uint16_t* tiles = expanded(w, 2 * pair, panels, 0);
      const uint16_t* next_tiles = pair + 1 < end_of(pairs) ? behind(w, tiles) : nullptr;
      for (int64_t r = r0; r < std::min(rows, r0 + block); r += 32) {
        const int64_t n_row = std::min<int64_t>(32, rows - r);
        many(b_.c, x, row0 + r, n_row, panels, tiles, r == r0 ? next_tiles : nullptr);
        deliver(r, n_row, 32 * pair, panels * infer_panel, 32);
      }
    }
  }
}

// silu(gate) * up straight from the product into the operand of the next one, 32 columns of both halves at a time.
// Needs d_ff to be a multiple of 32, so that panels of gate and up rows pair up.
void Worker::product_swiglu(const Operand& x, const FfnGroup& g, const Operand& act) {
  const InferMatrix& w = *g.gate_up;
  const int64_t up = w.n / 2 / infer_panel, units = w.n / 64;
  float a[32];
  const auto deliver = [&](int64_t r, int64_t n_row, int64_t u, int64_t n_unit, int64_t ldc) {
    for (int64_t i = 0; i < n_row; i++) {
      for (int64_t j = 0; j < n_unit; j++) {
        k_.swiglu(a, b_.c + i * ldc + 32 * j, b_.c2 + i * ldc + 32 * j, 32);
        put_cols(act, g.row0 + r + i, 32 * (u + j), 32, a);
      }
    }
  };
  if (use_few(x, g.rows)) {
    // Half of gate_up's own panels are gate rows, so its stream starts where the thread's share of units does.
    const WeightStream gate = stream_to(w, 2 * end_of(units), nullptr),
                       ups = stream_to(w, up + 2 * end_of(units), g.down);
    for (int64_t u = begin_of(units); u < end_of(units); u += few_panels / 2) {
      const int64_t n_unit = std::min(few_panels / 2, end_of(units) - u);
      few(b_.c, x, g.input_row, g.rows, w, 2 * u, 2 * n_unit, gate);
      few(b_.c2, x, g.input_row, g.rows, w, up + 2 * u, 2 * n_unit, ups);
      deliver(0, g.rows, u, n_unit, few_columns);
    }
    follow(ups);
  } else {
    for (int64_t u = begin_of(units); u < end_of(units); u++) {
      const uint16_t *gate_tiles = expanded(w, 2 * u, 2, 0), *up_tiles = expanded(w, up + 2 * u, 2, 2);
      for (int64_t r = 0; r < g.rows; r += 32) {
        const int64_t n_row = std::min<int64_t>(32, g.rows - r);
        const bool ask = r == 0 && u + 1 < end_of(units);
        many(b_.c, x, g.input_row + r, n_row, 2, gate_tiles, ask ? behind(w, gate_tiles) : nullptr);
        many(b_.c2, x, g.input_row + r, n_row, 2, up_tiles, ask ? behind(w, up_tiles) : nullptr);
        deliver(r, n_row, u, 1, 32);
      }
    }
  }
  if (end_of(units) == units) {
    for (int64_t r = 0; r < g.rows; r++) finish_row(act, g.row0 + r);
  }
}

void Worker::ffn_inner(const Operand& x, const FfnGroup* groups, int64_t n_group, Operand* act) {
  act->k = groups[0].down->k, act->kp = padded_k(act->k);
  if (groups[0].gate_up->n % 64 == 0) {
    for (int64_t g = 0; g < n_group; g++) product_swiglu(x, groups[g], *act);
    barrier();
    return;
  }
  const int64_t f = act->k;
  for (int64_t g = 0; g < n_group; g++)
    product(x, groups[g].input_row, groups[g].rows, *groups[g].gate_up, p_.gate_up + groups[g].row0 * 2 * f, 2 * f,
            false, groups[g].down);
  barrier();
  for (int64_t g = 0; g < n_group; g++) {
    for (int64_t r = begin_of(groups[g].rows); r < end_of(groups[g].rows); r++) {
      const float* gate = p_.gate_up + (groups[g].row0 + r) * 2 * f;
      k_.swiglu(b_.row, gate, gate + f, f);
      put_row(*act, groups[g].row0 + r, b_.row);
    }
  }
  barrier();
}

}  // namespace mm::cpu
