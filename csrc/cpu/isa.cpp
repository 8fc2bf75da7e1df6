#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastlm {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

Isa choose() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (Isa isa : kAll) {
      if (std::strcmp(forced, isa_name(isa)) != 0) continue;
      if (isa_supported(isa)) return isa;
      throw std::runtime_error(std::string("FASTLM_CPU_ISA: this processor or build has no ") +
                               forced);
    }
    throw std::runtime_error(
        std::string("FASTLM_CPU_ISA: expected baseline, avx2, avx512 or avx512bf16, got ") +
        forced);
  }
  Isa best = Isa::kBaseline;
  for (Isa isa : kAll) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    default:
      return "baseline";
  }
}

// __builtin_cpu_supports reads XCR0 as well, so a set the operating system does not save is off.
bool isa_supported(Isa isa) {
#if FASTLM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fastlm
