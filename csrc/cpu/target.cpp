// Compiles one row's CPU kernels for one instruction set.
//
// build_support/native.py compiles this file once per (stem, set) with -DFASTLM_STEM=rms_norm
// -DFASTLM_ISA=avx2 and that set's flags. Everything inside lives in the namespace of its set and
// an anonymous one: an inline function shared with another set's object could otherwise be linked
// in its wider version and crash an older processor. Only C headers and intrinsics stay outside.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if FASTLM_X86
#include <immintrin.h>
#endif

#define FASTLM_STR_(x) #x
#define FASTLM_STR(x) FASTLM_STR_(x)
// clang-format off
#define FASTLM_PATH(folder, stem) FASTLM_STR(folder/stem.h)  // no blanks: it names a file
// clang-format on

#include "common/convert.h"
#include FASTLM_PATH(ops, FASTLM_STEM)

// A word of the vocabulary (simd.h, math.h) or of a register tile: a call would hand its vectors
// over in memory, and in large files the compiler's limits on growth make calls of some.
#define FASTLM_WORD [[gnu::always_inline]] inline

// Ends every kernel file: FASTLM_EXPORT(RmsNormKernels, rms_norm) = {...};
#define FASTLM_EXPORT(Type, stem) \
  }                               \
  extern const Type stem;         \
  const Type stem

namespace fastlm {
namespace FASTLM_ISA {
namespace {
#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/element_type.h"
#include FASTLM_PATH(cpu, FASTLM_STEM)
}  // namespace
}  // namespace FASTLM_ISA
