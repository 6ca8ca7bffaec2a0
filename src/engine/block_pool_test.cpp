#include "engine/block_pool.h"

#include <gtest/gtest.h>

#include <array>
#include <set>

#include "engine/kv_space.h"
#include "engine/kv_views.h"
#include "tensor/memory.h"

namespace mm {

namespace {

TEST(BlockPool, OldestCachedBlocksAreForgottenFirst) {
  BlockPool pool(3, 2);
  const std::array<int32_t, 2> a{1, 2}, b{3, 4}, c{5, 6};
  const int32_t x = *pool.allocate(), y = *pool.allocate(), z = *pool.allocate();
  EXPECT_FALSE(pool.allocate());
  const auto ca = pool.publish(x, 0, a);
  const auto cb = pool.publish(y, ca, b);
  pool.publish(z, cb, c);
  for (const int32_t block : {y, x, z}) pool.release(block);
  EXPECT_EQ(pool.n_cached(), 3);
  EXPECT_EQ(pool.allocate(), y);  // released first
  EXPECT_FALSE(pool.find(ca, b));
  EXPECT_EQ(pool.find(0, a)->block, x);
  pool.retain(x);  // found and used: no longer a candidate
  EXPECT_EQ(pool.allocate(), z);
  EXPECT_FALSE(pool.allocate());
  pool.check();
}

TEST(BlockPool, TokensAreComparedNotOnlyHashed) {
  BlockPool pool(64, 1);
  // The same tokens behind another beginning are another content.
  const std::array<int32_t, 1> t{7}, u{8};
  const int32_t a = *pool.allocate(), b = *pool.allocate(), c = *pool.allocate();
  const auto first = pool.publish(a, 0, t), second = pool.publish(b, 0, u);
  EXPECT_NE(first, second);
  const auto behind = pool.publish(c, first, t);
  EXPECT_FALSE(pool.find(second, t));
  EXPECT_EQ(pool.find(first, t)->content, behind);
  // A second block of the same content counts as equal and is freed at once when nobody uses it.
  const int32_t d = *pool.allocate();
  EXPECT_EQ(pool.publish(d, 0, t), first);
  pool.release(d);
  EXPECT_EQ(pool.n_cached(), 0);
  pool.check();
}

TEST(KvSpace, AForkSharesBlocksUntilOneOfThemWrites) {
  KvSpace kv(KvLayout::paged, 64, 4, true);
  std::vector<RowCopy> copies;
  SequenceRows a, b;
  ASSERT_TRUE(kv.grow(a, 0, 6, copies));  // a full block and half of one
  ASSERT_TRUE(kv.fork(a, 6, b, copies));
  EXPECT_TRUE(copies.empty());
  EXPECT_EQ(a.blocks, b.blocks);
  EXPECT_EQ(kv.pool()->n_used(), 2);
  ASSERT_TRUE(kv.grow(b, 6, 7, copies));  // writes into the half-full one
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].count, 2);
  EXPECT_EQ(copies[0].from, kv.row(a, 4));
  EXPECT_EQ(copies[0].to, kv.row(b, 4));
  EXPECT_EQ(a.blocks[0], b.blocks[0]);
  EXPECT_NE(a.blocks[1], b.blocks[1]);
  ASSERT_TRUE(kv.grow(a, 6, 7, copies));  // it is the first one's alone now
  EXPECT_EQ(copies.size(), 1u);
  kv.release(a);
  kv.release(b);
  EXPECT_EQ(kv.pool()->n_used(), 0);
  kv.check();
}

TEST(KvSpace, AFullPoolChangesNothing) {
  for (const KvLayout layout : {KvLayout::paged, KvLayout::preallocated, KvLayout::concat}) {
    KvSpace kv(layout, 16, layout == KvLayout::paged ? 4 : 16, true);
    std::vector<RowCopy> copies;
    SequenceRows a, b;
    ASSERT_TRUE(kv.grow(a, 0, 12, copies));
    ASSERT_FALSE(kv.grow(b, 0, 8, copies));
    EXPECT_TRUE(b.blocks.empty());
    kv.release(a);
    EXPECT_TRUE(kv.grow(b, 0, 8, copies));
    kv.check();
  }
}

TEST(KvSpace, ConcatenationCopiesTheWholePastEveryTime) {
  KvSpace kv(KvLayout::concat, 64, 20, false);
  std::vector<RowCopy> copies;
  SequenceRows a;
  ASSERT_TRUE(kv.grow(a, 0, 5, copies));
  EXPECT_TRUE(copies.empty());
  for (int64_t n = 5; n < 20; n++) {
    copies.clear();
    const int32_t before = kv.row(a, 0);
    ASSERT_TRUE(kv.grow(a, n, n + 1, copies));
    ASSERT_EQ(copies.size(), 1u);
    EXPECT_EQ(copies[0].from, before);
    EXPECT_EQ(copies[0].count, n);
    EXPECT_TRUE(copies[0].to + n <= before || before + n <= copies[0].to) << "a copy onto itself";
  }
  kv.release(a);
  EXPECT_EQ(kv.free_rows(), 64);
}

TEST(KvSpace, OnlyWholePublishedBlocksAreMatched) {
  KvSpace kv(KvLayout::paged, 64, 4, true);
  std::vector<RowCopy> copies;
  std::vector<int32_t> text;
  for (int32_t i = 0; i < 11; i++) text.push_back(i);
  SequenceRows a, b, c;
  ASSERT_TRUE(kv.grow(a, 0, 11, copies));
  kv.publish(a, text, 11);
  EXPECT_EQ(kv.match(b, text, 11), 8);
  EXPECT_EQ(b.blocks[1], a.blocks[1]);
  text[5] = 99;
  EXPECT_EQ(kv.match(c, text, 11), 4);
  for (SequenceRows* s : {&a, &b, &c}) kv.release(*s);
  EXPECT_EQ(kv.pool()->n_cached(), 2);
  kv.forget();
  EXPECT_EQ(kv.match(b, text, 11), 0);
}

TEST(KvViews, HeadsReachNewPagesOneByOne) {
  constexpr auto page = static_cast<int64_t>(large_page);
  ModelConfig c;
  for (const auto& [layers, heads, d_head] : {std::array{8, 4, 96}, {8, 2, 64}, {16, 5, 80}, {1, 1, 8}}) {
    c.num_hidden_layers = layers, c.num_key_value_heads = heads, c.head_dim = d_head;
    for (const KvFormat format : {KvFormat::f32, KvFormat::bf16, KvFormat::i8}) {
      const int64_t row = d_head * static_cast<int64_t>(kv_element_bytes(format)), n = layers * heads;
      for (const int64_t n_row : {int64_t{32768}, page / row, int64_t{1000000}}) {
        const int64_t rows = staggered_rows(c, format, n_row);
        EXPECT_GE(rows, n_row);
        EXPECT_LE((rows - n_row) * row, page + 32 * row);
        EXPECT_EQ(rows * row % 64, 0);
        std::set<int64_t> places;  // where pieces begin, in a page
        for (int64_t i = 0; i < n; i++) places.insert(i * rows * row % page / (page / n));
        if (n_row * row < page) continue;
        EXPECT_GE(static_cast<int64_t>(places.size()), n * 3 / 4) << n << " " << row << " " << n_row;
      }
      EXPECT_EQ(staggered_rows(c, format, 100), 100);  // below a page
    }
  }
}

}  // namespace

}  // namespace mm
