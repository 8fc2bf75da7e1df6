// Contract of layer_norm: y[r,:] = (s[r,:] - mean) * rsqrt(var(s[r,:]) + eps) * weight + bias.
#pragma once
#include "ops/norm.h"

namespace fastlm {

using LayerNormKernels = NormKernels;

}  // namespace fastlm
