// The instruction sets a binary carries and the one in use.
//
// Every kernel table exists once per set; FASTLM_KERNEL_TABLE(Type, stem) gives a function
// `const Type& stem_kernels()` that returns the one for the active set.
#pragma once

namespace fastlm {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Chosen once, at first use, from what the processor and the operating system offer; the
// environment variable FASTLM_CPU_ISA forces one and throws std::runtime_error when it names an
// unknown or unsupported set.
Isa active_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

}  // namespace fastlm

#if FASTLM_X86
#define FASTLM_KERNEL_TABLE(Type, stem) \
  namespace fastlm {                    \
  namespace baseline {                  \
  extern const Type stem;               \
  }                                     \
  namespace avx2 {                      \
  extern const Type stem;               \
  }                                     \
  namespace avx512 {                    \
  extern const Type stem;               \
  }                                     \
  namespace avx512bf16 {                \
  extern const Type stem;               \
  }                                     \
  namespace amx {                       \
  extern const Type stem;               \
  }                                     \
  static const Type& stem##_kernels() { \
    switch (active_isa()) {             \
      case Isa::kAmx:                   \
        return amx::stem;               \
      case Isa::kAvx512Bf16:            \
        return avx512bf16::stem;        \
      case Isa::kAvx512:                \
        return avx512::stem;            \
      case Isa::kAvx2:                  \
        return avx2::stem;              \
      default:                          \
        return baseline::stem;          \
    }                                   \
  }                                     \
  }
#else
#define FASTLM_KERNEL_TABLE(Type, stem)                          \
  namespace fastlm {                                             \
  namespace baseline {                                           \
  extern const Type stem;                                        \
  }                                                              \
  static const Type& stem##_kernels() { return baseline::stem; } \
  }
#endif
