// Binding of sample's CUDA kernel: launches and registers it. Nothing waits for the device.
#include "torch/sample.h"

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

struct SampleOnGpu : cuda::OnDevice {
  using OnDevice::OnDevice;
  void run(const Sample& args) const {
    STD_TORCH_CHECK(args.vocab < int64_t{1} << 32, "sample: logits must be [B, V < 2^32]");
    cuda::check(cuda::sample(args, stream()), "sample");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("sample", TORCH_BOX(&sample<SampleOnGpu>)); }

}  // namespace fastlm
