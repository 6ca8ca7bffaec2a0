// Matrix products: fp32 against the specification, bf16 against the product of rounded operands.
#include "kernels/cases/check_op.h"
#include "kernels/cases/linear_cases.h"
#include "kernels/ref/ref_ops.h"

namespace mm {

using cases::added_output, cases::Bits, cases::check_op, cases::Input, cases::linear_cases, cases::LinearCase,
    cases::Output, cases::set_output;

using Linear = cases::KernelTest;

namespace {

// A padded output: rows of `cols` elements, `pad` fill elements after each.
Output padded(Output out, int64_t rows, int64_t cols, int64_t pad) {
  for (int64_t r = 0; r < rows; r++) std::fill_n(out.init.begin() + r * (cols + pad) + cols, pad, cases::fill());
  return out;
}

void check_fwd(const LinearCase& c, bool accumulate) {
  const int64_t ldx = c.k + c.pad, ldy = c.n + c.pad;
  const Input x(c.m * ldx, 1, c.offset), w(c.n * c.k, 2, c.offset);
  Output y = accumulate ? added_output("y", c.m * ldy, 3, c.floor_y()) : set_output("y", c.m * ldy, c.floor_y());
  check_op(
      c.name(), c.offset, {padded(std::move(y), c.m, c.n, c.pad)},
      [&]<class T>(T** out) {
        ref::linear_fwd<T, T>(out[0], ldy, x.get<T>(), ldx, w.get<T>(), c.m, c.n, c.k, accumulate, false);
      },
      [&](const KernelTable& kernels, float** out) {
        kernels.linear_fwd(out[0], ldy, x.f(), ldx, w.f(), c.m, c.n, c.k, accumulate, false);
      },
      Bits::any);
}

void check_bwd(const LinearCase& c, bool accumulate_dx) {
  const int64_t ldx = c.k + c.pad, ldy = c.n + c.pad;
  const Input x(c.m * ldx, 1, c.offset), w(c.n * c.k, 2, c.offset), dy(c.m * ldy, 4, c.offset);
  Output dx =
      accumulate_dx ? added_output("dx", c.m * ldx, 5, c.floor_dx()) : set_output("dx", c.m * ldx, c.floor_dx());
  const Output dw = added_output("dw", c.n * c.k, 6, c.floor_dw());
  check_op(
      c.name(), c.offset, {padded(std::move(dx), c.m, c.k, c.pad), dw},
      [&]<class T>(T** out) {
        ref::linear_bwd<T, T>(out[0], ldx, out[1], dy.get<T>(), ldy, x.get<T>(), ldx, w.get<T>(), c.m, c.n, c.k,
                              accumulate_dx, false);
      },
      [&](const KernelTable& kernels, float** out) {
        kernels.linear_bwd(out[0], ldx, out[1], dy.f(), ldy, x.f(), ldx, w.f(), c.m, c.n, c.k, accumulate_dx, false);
      },
      Bits::any);
}

}  // namespace

TEST_F(Linear, Forward) {
  for (const LinearCase& c : linear_cases) check_fwd(c, false), check_fwd(c, true);
}

TEST_F(Linear, Backward) {
  for (const LinearCase& c : linear_cases) check_bwd(c, false), check_bwd(c, true);
}

TEST_F(Linear, BackwardLeavesOutWhatIsNull) {
  const LinearCase c{13, 31, 17, 0, 1};
  const Input x(c.m * c.k, 1), w(c.n * c.k, 2), dy(c.m * c.n, 4);
  for (const bool bf16 : {false, matmul_bf16_available()}) {
    std::vector<float> dx(static_cast<size_t>(c.m * c.k)), dw(static_cast<size_t>(c.n * c.k)), dx2 = dx, dw2 = dw;
    const KernelTable& k = cpu_kernels();
    k.linear_bwd(dx.data(), c.k, dw.data(), dy.f(), c.n, x.f(), c.k, w.f(), c.m, c.n, c.k, false, bf16);
    k.linear_bwd(dx2.data(), c.k, nullptr, dy.f(), c.n, x.f(), c.k, w.f(), c.m, c.n, c.k, false, bf16);
    k.linear_bwd(nullptr, 0, dw2.data(), dy.f(), c.n, x.f(), c.k, w.f(), c.m, c.n, c.k, false, bf16);
    EXPECT_EQ(dx, dx2);
    EXPECT_EQ(dw, dw2);
  }
}

namespace {

float to_bf16_and_back(float x) {  // nearest, ties to even; finite x
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
}

Input rounded(const Input& x, int64_t n) {
  Input r(n, 0);
  for (int64_t i = 0; i < n; i++) r.set(i, to_bf16_and_back(x.f()[i]));
  return r;
}

}  // namespace

// Against the unrounded exact product. The plain run gets rounded operands; its sums are exact, so its error is that of
// the rounding alone.
TEST_F(Linear, Bf16IsAsGoodAsRoundedOperands) {
  if (!matmul_bf16_available()) GTEST_SKIP() << "this machine has no AVX-512 BF16";
  for (const LinearCase& c : linear_cases) {
    const int64_t ldx = c.k + c.pad, ldy = c.n + c.pad;
    const Input x(c.m * ldx, 1, c.offset), w(c.n * c.k, 2, c.offset), dy(c.m * ldy, 4, c.offset);
    const Input xr = rounded(x, c.m * ldx), wr = rounded(w, c.n * c.k), dyr = rounded(dy, c.m * ldy);
    for (const bool accumulate : {false, true}) {
      Output y = accumulate ? added_output("y", c.m * ldy, 3, c.floor_y()) : set_output("y", c.m * ldy, c.floor_y());
      check_op(
          "bf16 " + c.name(), c.offset, {padded(std::move(y), c.m, c.n, c.pad)},
          [&]<class T>(T** out) {
            const bool exact = std::is_same_v<T, double>;
            ref::linear_fwd<T>(out[0], ldy, (exact ? x : xr).template get<T>(), ldx, (exact ? w : wr).template get<T>(),
                               c.m, c.n, c.k, accumulate, false);
          },
          [&](const KernelTable& kernels, float** out) {
            kernels.linear_fwd(out[0], ldy, x.f(), ldx, w.f(), c.m, c.n, c.k, accumulate, true);
          },
          Bits::any);
      Output dx =
          accumulate ? added_output("dx", c.m * ldx, 5, c.floor_dx()) : set_output("dx", c.m * ldx, c.floor_dx());
      check_op(
          "bf16 " + c.name(), c.offset,
          {padded(std::move(dx), c.m, c.k, c.pad), added_output("dw", c.n * c.k, 6, c.floor_dw())},
          [&]<class T>(T** out) {
            const bool exact = std::is_same_v<T, double>;
            ref::linear_bwd<T>(out[0], ldx, out[1], (exact ? dy : dyr).template get<T>(), ldy,
                               (exact ? x : xr).template get<T>(), ldx, (exact ? w : wr).template get<T>(), c.m, c.n,
                               c.k, accumulate, false);
          },
          [&](const KernelTable& kernels, float** out) {
            kernels.linear_bwd(out[0], ldx, out[1], dy.f(), ldy, x.f(), ldx, w.f(), c.m, c.n, c.k, accumulate, true);
          },
          Bits::any);
    }
  }
}

}  // namespace mm
