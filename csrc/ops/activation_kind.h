// The activations, in the order of fastlm.ops.activation.KINDS.
#pragma once

namespace fastlm {

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

}  // namespace fastlm
