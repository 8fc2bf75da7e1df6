// Element types the kernels know. Torch-free; only plain types, so that no function of this header
// can be emitted by one instruction set's object and linked into another's.
#pragma once
#include <cstdint>

namespace fastlm {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace fastlm
