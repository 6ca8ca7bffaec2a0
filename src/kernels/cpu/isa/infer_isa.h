// Units with intrinsics: each replaces kernels of a table by its own. A table for one instruction set starts from the
// portable kernels compiled for it and takes the units it includes, in order.
#pragma once

#include "kernels/cpu/infer_kernels.h"

namespace mm {

void use_avx2(InferKernels* k);         // AVX2, FMA, F16C
void use_avx512(InferKernels* k);       // AVX-512 F, BW, DQ, VL
void use_avx512_bf16(InferKernels* k);  // and VNNI, BF16
void use_amx(InferKernels* k);          // and AMX tiles with BF16

void attend_avx2(const AttendArgs& a);
void attend_few_avx2(const AttendArgs& a);
void attend_avx512(const AttendArgs& a);
void attend_few_avx512(const AttendArgs& a);

}  // namespace mm
