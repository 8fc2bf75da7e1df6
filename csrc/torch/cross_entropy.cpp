// Binding of cross_entropy: checks, splits rows over threads, reduces, registers.
#include "torch/cross_entropy.h"

#include <tuple>
#include <vector>

namespace fastlm {
namespace {

// Gradients beyond this many bytes are streamed: they would push everything else out of the cache.
constexpr int64_t kStreamBytes = 24 << 20;

// Returns the loss, reduced or per token [rows], and with `gradient` the gradient of that scalar
// (of the sum where it is not reduced), else an empty tensor.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_, const Tensor& target_,
                                         const std::optional<Tensor>& class_weight,
                                         const std::optional<Tensor>& scale, int64_t ignore_index,
                                         double smoothing, double z_loss, double softcap,
                                         int64_t reduction, bool gradient) {
  const Tensor logits = dense(logits_), target = dense(target_);
  STD_TORCH_CHECK(logits.dim() > 0 && logits.size(-1) > 0, "logits must be [..., V] with V > 0");
  STD_TORCH_CHECK(target.dim() == logits.dim() - 1, "target must be [...]");
  for (int64_t d = 0; d < target.dim(); ++d) {
    STD_TORCH_CHECK(target.size(d) == logits.size(d), "target must be [...]");
  }
  const int64_t classes = logits.size(-1), rows = target.numel();
  check_targets(target, classes, ignore_index);
  CrossEntropy args =
      cross_entropy_arguments(static_cast<const int64_t*>(target.const_data_ptr()), rows, classes,
                              floats(class_weight, classes), floats(scale, rows),
                              {ignore_index, smoothing, z_loss, softcap}, dtype_of(logits));
  args.logits = logits.const_data_ptr();
  const double count = reduction == kMean ? mean_divisor(args) : 1.0;
  args.factor = static_cast<float>(1.0 / count);

  Tensor grad = gradient ? empty_cpu_like(logits) : empty_cpu({0}, logits.scalar_type());
  if (gradient) {
    args.grad = grad.mutable_data_ptr();
    const int64_t row_bytes = classes * static_cast<int64_t>(logits.element_size());
    args.stream = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(args.grad) % 64 == 0 &&
                  rows * row_bytes > kStreamBytes;
  }
  Tensor out =
      reduction == kNone ? empty_cpu({rows}, ScalarType::Float) : empty_cpu({}, ScalarType::Float);
  std::vector<float> tokens(reduction == kNone ? 0 : static_cast<size_t>(rows));
  args.loss = reduction == kNone ? static_cast<float*>(out.mutable_data_ptr()) : tokens.data();
  run_cross_entropy(args);
  const double total = weigh_losses(args);
  if (reduction != kNone) {
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(total / count);
  }
  return {out, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("cross_entropy", TORCH_BOX(&cross_entropy)); }

}  // namespace fastlm
