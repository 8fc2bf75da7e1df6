// Binding of activation: splits rows over threads, registers the CPU kernels.
#include "torch/activation.h"

#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(ActivationKernels, activation)

namespace fastlm {
namespace {

// Cuts the work: rows where there are several, else columns at multiples of a cache line, so that
// no two threads write the same one.
template <class Args, class Kernel>
void split(const Args& args, Kernel kernel, int64_t bytes) {
  if (args.rows == 1) {
    constexpr int64_t kLine = 64;
    parallel_rows((args.cols + kLine - 1) / kLine, kLine * bytes, [&](int64_t b, int64_t e) {
      kernel(args, 0, 1, b * kLine, std::min(e * kLine, args.cols));
    });
  } else {
    parallel_rows(args.rows, args.cols * bytes,
                  [&](int64_t b, int64_t e) { kernel(args, b, e, 0, args.cols); });
  }
}

struct OnCpu {
  explicit OnCpu(const Tensor&) {}
  Tensor empty_like(const Tensor& t) const { return empty_cpu_like(t); }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty_cpu(sizes, dtype);
  }
  void run(const ActivationForward& args) const { split(args, activation_kernels().forward, 12); }
  void run(const ActivationBackward& args) const { split(args, activation_kernels().backward, 20); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("activation", TORCH_BOX(&activation<OnCpu>));
  m.impl("gated_activation", TORCH_BOX(&gated_activation<OnCpu>));
  m.impl("packed_activation", TORCH_BOX(&packed_activation<OnCpu>));
  m.impl("activation_backward", TORCH_BOX(&activation_backward<OnCpu>));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward<OnCpu>));
  m.impl("packed_activation_backward", TORCH_BOX(&packed_activation_backward<OnCpu>));
}

}  // namespace fastlm
