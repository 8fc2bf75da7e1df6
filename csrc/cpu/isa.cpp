#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if FASTLM_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if FASTLM_X86
// Whether the processor multiplies tiles of bf16 and Linux lets this process use their registers,
// which are off until asked for.
bool has_tiles() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kTileBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kTileBf16) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
        std::string("FASTLM_CPU_ISA: expected baseline, avx2, avx512, avx512bf16 or amx, got ") +
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
    case Isa::kAmx:
      return "amx";
    default:
      return "baseline";
  }
}

// __builtin_cpu_supports reads XCR0 as well, so a set the operating system does not save is off.
// FASTLM_ISAS: how many of the sets, from the first, the build has compiled.
bool isa_supported(Isa isa) {
#if FASTLM_X86
  if (static_cast<int>(isa) >= FASTLM_ISAS) return false;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kAmx:
      return bf16 && has_tiles();
    case Isa::kAvx512Bf16:
      return bf16;
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
