// Attention of the inference step: rotation and write of new keys and values, then either tasks of (sequence, block of
// tokens, kv head), long ones first, handed out one by one; or, in a decode step, an even split of all keys over the
// threads, where a (sequence, kv head) cut by a border leaves partial sums that the next stage combines.
#include <cmath>
#include <cstring>

#include "kernels/cpu/infer_worker.h"

namespace mm::cpu {

namespace {

int64_t kv_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::f32: return 4;
    case KvFormat::bf16:
    case KvFormat::f16: return 2;
    case KvFormat::i8: return 1;
  }
  return 0;
}

// Decode splits keys by blocks of 16: with a short past two kv heads keep four threads busy.
constexpr int64_t split_block = 16;
int64_t key_blocks(int64_t n_key) { return (n_key + split_block - 1) / split_block; }

// Position `at` of the sum over items of (blocks + 1): an item costs something of its own.
constexpr int64_t item_cost = 2;

}  // namespace

// The first keys and values of a segment come while its queries are rotated; the others are the hardware's business.
static void ask_for_keys(const AttendArgs& a) {
  const int64_t bytes = kv_bytes(a.format);
  for (int64_t key = a.key_begin; key < std::min(a.key_end, a.key_begin + 64); key++) {
    const int64_t row = a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1));
    for (int64_t i = 0; i < a.d_head * bytes; i += 64) {
      __builtin_prefetch(static_cast<const char*>(a.k) + row * a.d_head * bytes + i);
      __builtin_prefetch(static_cast<const char*>(a.v) + row * a.d_head * bytes + i);
    }
  }
}

void split_keys(StepShared& shared, int n_thread) {
  const InferStep& step = shared.step;
  KeyBoundary* bounds = shared.plan.bounds;
  const int64_t n_kv = shared.model.n_kv_head, n_item = step.n_seq * n_kv;
  int64_t total = 0;
  for (int64_t s = 0; s < step.n_seq; s++) total += n_kv * (key_blocks(step.kv_len[s]) + item_cost);
  // The first tile product after a stage without any costs about 1 us: as much as fp32 needs for 100 keys more.
  shared.short_past = total * split_block <= 192 * n_thread;
  int64_t item = 0, passed = 0;
  for (int t = 0; t <= n_thread; t++) {
    const int64_t at = total * t / n_thread;
    while (item < n_item && passed + key_blocks(step.kv_len[item / n_kv]) + item_cost <= at) {
      passed += key_blocks(step.kv_len[item / n_kv]) + item_cost;
      item++;
    }
    bounds[t] = {item, item < n_item ? std::min(at - passed, key_blocks(step.kv_len[item / n_kv]) - 1) : 0};
  }
}

AttendArgs Worker::attend_args(int64_t seq, int kv_head, int64_t l) const {
  const InferKv& kv = s_.kv;
  const int64_t dh = m_.d_head, bytes = kv_bytes(kv.format);
  const int64_t first = (l * m_.n_kv_head + kv_head) * rows_of(kv);  // row
  const int64_t offset = first * dh * bytes;
  const bool scaled = kv.format == KvFormat::i8;
  return {.group = m_.n_head / m_.n_kv_head,
          .d_head = m_.d_head,
          .scale = m_.attention_scale,
          .format = kv.format,
          .k = static_cast<const char*>(kv.k) + offset,
          .v = static_cast<const char*>(kv.v) + offset,
          .k_scale = scaled ? kv.k_scale + first : nullptr,
          .v_scale = scaled ? kv.v_scale + first : nullptr,
          .table = step_.table + seq * step_.table_ld,
          .block_shift = step_.block_shift,
          .scratch = b_.attend};
}

void Worker::rope_q(const InferLayer& layer, int64_t token, int head, float* to) const {
  const int64_t dh = m_.d_head, at = step_.positions[token] * (dh / 2);
  k_.rope_head(to, p_.qkv + token * layer.qkv.n + head * dh, layer.q_norm, m_.cos + at, m_.sin + at, m_.eps, m_.d_head);
}

void Worker::store_kv(const InferLayer& layer, int64_t token, int kv_head, int64_t l) {
  const InferKv& kv = s_.kv;
  const int64_t dh = m_.d_head, at = step_.positions[token] * (dh / 2), slot = step_.slots[token];
  const float* k = p_.qkv + token * layer.qkv.n + (m_.n_head + kv_head) * dh;
  k_.rope_head(b_.row, k, layer.k_norm, m_.cos + at, m_.sin + at, m_.eps, m_.d_head);
  const int64_t row = (l * m_.n_kv_head + kv_head) * rows_of(kv) + slot;
  const int64_t offset = row * dh * kv_bytes(kv.format);
  const bool scaled = kv.format == KvFormat::i8;
  k_.put_kv(kv.format, static_cast<char*>(kv.k) + offset, scaled ? kv.k_scale + row : nullptr, b_.row, dh);
  k_.put_kv(kv.format, static_cast<char*>(kv.v) + offset, scaled ? kv.v_scale + row : nullptr, k + m_.n_kv_head * dh,
            dh);
}

void Worker::rope_and_store(const InferLayer& layer, int64_t l) {
  for (int64_t t = begin_of(p_.n_tok); t < end_of(p_.n_tok); t++) {
    for (int h = 0; h < m_.n_head; h++) rope_q(layer, t, h, p_.qkv + t * layer.qkv.n + h * m_.d_head);
    for (int h = 0; h < m_.n_kv_head; h++) store_kv(layer, t, h, l);
  }
}

void Worker::attend(const AttendArgs& a, bool f32) const {
  const auto few = f32 || s_.short_past ? k_.attend_few : k_.attend_few_bf16;
  if (few != nullptr && !s_.invariant && a.n_tok == 1 && a.group <= 4) few(a);
  else (f32 ? k_.attend : k_.attend_bf16)(a);
}

void Worker::attend_tasks(int64_t l) {
  std::atomic<int64_t>& next = s_.next_task[l % 2];
  if (t_ == 0) s_.next_task[(l + 1) % 2] = 0;  // all are past the layer before and not yet in the next
  const int64_t group = m_.n_head / m_.n_kv_head, dh = m_.d_head;
  const int64_t block = std::max<int64_t>(1, attend_rows / group);
  const int64_t width = m_.layers[l].qkv.n;
  const bool f32 = m_.layers[l].qkv.format == WeightFormat::f32;
  int64_t seq = 0, first = 0;  // tasks of earlier sequences
  for (int64_t i = next++;; i = next++) {
    const auto blocks = [&] { return (step_.cu[seq + 1] - step_.cu[seq] + block - 1) / block; };
    while (seq < step_.n_seq && i - first >= blocks() * m_.n_kv_head) first += blocks() * m_.n_kv_head, seq++;
    if (seq == step_.n_seq) return;
    const int64_t q_len = step_.cu[seq + 1] - step_.cu[seq];
    const int64_t begin = (blocks() - 1 - (i - first) / m_.n_kv_head) * block;  // the last tokens see most keys
    const auto head = static_cast<int>((i - first) % m_.n_kv_head);
    AttendArgs a = attend_args(seq, head, l);
    a.n_tok = std::min(block, q_len - begin);
    a.q = p_.qkv + (step_.cu[seq] + begin) * width + head * group * dh;
    a.ldq = width;
    a.visible = step_.kv_len[seq] - q_len + begin + 1;
    a.key_end = a.visible + a.n_tok - 1;
    a.out = p_.attn + (step_.cu[seq] + begin) * m_.n_head * dh + head * group * dh;
    a.ldo = m_.n_head * dh;
    attend(a, f32);
  }
}

// Partial sums of thread t: slot 2 t of a segment that starts inside its item, 2 t + 1 of one that starts it.
void Worker::attend_decode(const InferLayer& layer, int64_t l) {
  const int64_t group = m_.n_head / m_.n_kv_head, dh = m_.d_head;
  const KeyBoundary from = p_.bounds[t_], to = p_.bounds[t_ + 1];
  const bool f32 = layer.qkv.format == WeightFormat::f32;
  for (int64_t item = from.item; item < to.item || (item == to.item && to.block > 0); item++) {
    const int64_t seq = item / m_.n_kv_head, n_key = step_.kv_len[seq];
    const auto head = static_cast<int>(item % m_.n_kv_head);
    const int64_t begin = item == from.item ? from.block : 0;
    const bool last = item != to.item;
    if (!last && begin == to.block) break;  // nothing of it
    AttendArgs a = attend_args(seq, head, l);
    a.q = b_.q;
    a.n_tok = 1;
    a.visible = n_key;
    a.key_begin = begin * split_block;
    a.key_end = last ? n_key : to.block * split_block;
    ask_for_keys(a);
    if (last) store_kv(layer, seq, head, l);
    for (int64_t h = 0; h < group; h++) rope_q(layer, seq, static_cast<int>(head * group + h), b_.q + h * dh);
    if (begin > 0 || !last) {
      a.partial = p_.partial + (2 * t_ + (begin > 0 ? 0 : 1)) * p_.partial_floats;
    } else {
      a.out = p_.attn + seq * m_.n_head * dh + head * group * dh;
    }
    attend(a, f32);
  }
}

// The partial sums of an item, into b_.parts; 0: it was not split.
int Worker::parts_of(int64_t item) const {
  if (!s_.decode) return 0;
  int first = 1, n = 0;  // the first border inside the item
  while (first < n_ && (p_.bounds[first].item != item || p_.bounds[first].block == 0)) first++;
  if (first >= n_) return 0;
  b_.parts[n++] = p_.partial + (2 * (first - 1) + 1) * p_.partial_floats;
  for (int t = first; t < n_ && p_.bounds[t].item == item; t++) {
    const KeyBoundary &b = p_.bounds[t], &e = p_.bounds[t + 1];
    if (b.item != e.item || b.block != e.block) b_.parts[n++] = p_.partial + 2 * t * p_.partial_floats;
  }
  return n;
}

void Worker::combine_token(int64_t token, float* to) const {
  const int64_t group = m_.n_head / m_.n_kv_head, n = group * m_.d_head;
  // Other cores have just written them: ask for all before the first is needed.
  for (int64_t item = token * m_.n_kv_head; item < (token + 1) * m_.n_kv_head; item++) {
    for (int i = parts_of(item) - 1; i >= 0; i--)
      for (int64_t at = 0; at < p_.partial_floats; at += 16) __builtin_prefetch(b_.parts[i] + at);
  }
  for (int64_t item = token * m_.n_kv_head; item < (token + 1) * m_.n_kv_head; item++, to += n) {
    const int n_part = parts_of(item);
    if (n_part > 0) k_.merge_parts(to, b_.parts, n_part, group, m_.d_head);
    else std::memcpy(to, p_.attn + item * n, static_cast<size_t>(n) * 4);
  }
}

}  // namespace mm::cpu
