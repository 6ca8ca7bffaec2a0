// The norm between two int8 products of one token, split over the threads by columns of the residual stream. Each
// thread quantizes what it has just computed, times the norm's weight, and adds up its squares; behind the barrier
// every thread puts the shares together and takes 1 / rms into the scales. A third of the bytes of x cross from core to
// core, and each column is quantized once: 0.55 -> 0.35 us a norm.
#include <cmath>
#include <cstring>

#include "kernels/cpu/infer_worker.h"

namespace mm::cpu {

namespace {

// [columns] int8, [columns / 32] fp32 scales, int32 corrections, fp32 sums of squares.
struct Share {
  int8_t* q;
  float* scales;
  int32_t* corrections;
  float* squares;

  Share(const StepPlan& plan, int thread) {
    const int64_t n = plan.share_columns, groups = n / 32;
    q = reinterpret_cast<int8_t*>(plan.shares + thread * plan.share_bytes);
    scales = reinterpret_cast<float*>(q + n);
    corrections = reinterpret_cast<int32_t*>(scales + groups);
    squares = reinterpret_cast<float*>(corrections + groups);
  }
};

}  // namespace

void Worker::offer(const float* norm) {
  const int64_t n = p_.share_columns, begin = n * t_;
  const Share mine(p_, t_);
  k_.weigh(b_.row, mine.squares, p_.x + begin, norm + begin, n);
  k_.put_q8(mine.q, b_.row, 0, n, n);
}

Operand Worker::take() const {
  const int64_t n = p_.share_columns, groups = n / 32;
  const Operand to{OperandKind::q8, m_.d_model, padded_k(m_.d_model), b_.operand};
  int8_t* q = to.q8(0);
  float* scales = reinterpret_cast<float*>(q + to.kp);
  int32_t* corrections = reinterpret_cast<int32_t*>(scales + to.kp / 32);
  float sum = 0;  // in the order of the columns, whatever the number of threads
  for (int t = 0; t < n_; t++) {
    const Share share(p_, t);
    for (int64_t g = 0; g < groups; g++) sum += share.squares[g];
  }
  const float r = 1.0f / std::sqrt(sum / static_cast<float>(m_.d_model) + m_.eps);
  for (int t = 0; t < n_; t++) {
    const Share share(p_, t);
    std::memcpy(q + n * t, share.q, static_cast<size_t>(n));
    for (int64_t g = 0; g < groups; g++) scales[groups * t + g] = share.scales[g] * r;
    std::memcpy(corrections + groups * t, share.corrections, static_cast<size_t>(groups) * 4);
  }
  return to;
}

}  // namespace mm::cpu
