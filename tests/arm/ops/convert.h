// Contract of the tests' own row: element types from and to fp32, whole vectors and tails.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct Convert {
  const void* from;  // fp32, or of `dtype` where `widen`
  void* to;
  int64_t count, step;  // values, and how many of them at a time
  DType dtype;
  bool widen;
};

struct ConvertKernels {
  void (*run)(const Convert&);
};

}  // namespace fastlm
