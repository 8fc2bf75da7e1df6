// Binding of activation's CUDA kernels: launches and registers them.
#include "torch/activation.h"

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

struct ActivationOnGpu : cuda::OnDevice {
  using OnDevice::OnDevice;
  void run(const ActivationForward& args) const {
    cuda::check(cuda::activation_forward(args, stream()), "activation");
  }
  void run(const ActivationBackward& args) const {
    cuda::check(cuda::activation_backward(args, stream()), "activation_backward");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) {
  m.impl("activation", TORCH_BOX(&activation<ActivationOnGpu>));
  m.impl("gated_activation", TORCH_BOX(&gated_activation<ActivationOnGpu>));
  m.impl("packed_activation", TORCH_BOX(&packed_activation<ActivationOnGpu>));
  m.impl("activation_backward", TORCH_BOX(&activation_backward<ActivationOnGpu>));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward<ActivationOnGpu>));
  m.impl("packed_activation_backward", TORCH_BOX(&packed_activation_backward<ActivationOnGpu>));
}

}  // namespace fastlm
