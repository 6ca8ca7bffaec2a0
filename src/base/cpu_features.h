// What the processor offers, and which instruction-set variant of the kernels runs.
#pragma once

#include <string>
#include <vector>

namespace mm {

// Each includes the ones before it. avx512_bf16 and amx are known to the inference step alone; others take avx512.
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C
  bool avx512 = false;       // F + BW + DQ + VL
  bool avx512_bf16 = false;  // and VNNI
  bool amx_bf16 = false;     // and the system lets this process use it
  std::string model_name;    // from /proc/cpuinfo, "" if unknown
};

const CpuFeatures& cpu_features();
std::vector<Isa> available_isas();  // best last; scalar always first
// The best available one, or what MINIMIND_CPU=scalar|avx2|avx512|avx512_bf16|amx asks for (Error if the machine lacks
// it).
Isa selected_isa();
const char* isa_name(Isa isa);

}  // namespace mm
