#include "base/cpu_features.h"

#include <cstdlib>
#include <fstream>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mm {

#if defined(__x86_64__)
// Linux hands out the state of AMX tiles on request, once for a process and its threads to come.
static bool allow_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

static CpuFeatures detect() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (f.avx512_bf16 && __get_cpuid_count(7, 0, &a, &b, &c, &d)) f.amx_bf16 = ((d >> 22) & 1u) != 0 && allow_tiles();
#endif
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("model name", 0) == 0) {
      const size_t colon = line.find(": ");
      if (colon != std::string::npos) f.model_name = line.substr(colon + 2);
      break;
    }
  }
  return f;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures f = detect();
  return f;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> v{Isa::scalar};
  if (cpu_features().avx2) v.push_back(Isa::avx2);
  if (cpu_features().avx512) v.push_back(Isa::avx512);
  if (cpu_features().avx512_bf16) v.push_back(Isa::avx512_bf16);
  if (cpu_features().amx_bf16) v.push_back(Isa::amx);
  return v;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

Isa selected_isa() {
  const char* env = std::getenv("MINIMIND_CPU");
  if (env == nullptr || *env == '\0') return available_isas().back();
  for (const Isa isa : available_isas()) {
    if (isa_name(isa) == std::string(env)) return isa;
  }
  std::string have;
  for (const Isa isa : available_isas()) have += std::string(have.empty() ? "" : "|") + isa_name(isa);
  throw Error("MINIMIND_CPU", have + " (what this machine has)", env, "unset it to use the best");
}

}  // namespace mm
