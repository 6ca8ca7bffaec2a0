// The tolerance rule of every op: a kernel's largest error is at most twice that of a plain fp32 implementation of the
// same formula plus a floor, both errors measured against the fp64 instance of the specification (kernels/ref).
//
// The floor is there because the plain implementation is at times exactly right by luck (one element, sums of a few
// terms). Each case file states it as rounding(size): a result of about `size` is off by half a unit in the last place
// whatever computed it; four of those are allowed for the largest element of an output.
#pragma once

namespace mm::cases {

constexpr double half_ulp = 0x1p-24;  // of fp32 values around 1

constexpr double rounding(double size) { return 4 * half_ulp * size; }

}  // namespace mm::cases
