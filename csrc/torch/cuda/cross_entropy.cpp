// Binding of cross_entropy's CUDA kernels: checks, allocates, registers. Nothing waits for the
// device.
#include "ops/cross_entropy.h"

#include <tuple>

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

void check_floats(const std::optional<Tensor>& t, int64_t count, const Tensor& logits) {
  STD_TORCH_CHECK(
      !t || (cuda::same_place(*t, logits) && t->scalar_type() == ScalarType::Float &&
             t->is_contiguous() && t->numel() == count),
      "weights must be contiguous, fp32, on the device of the logits, and one per class "
      "or token");
}

CrossEntropy arguments(const Tensor& logits, const Tensor& target,
                       const std::optional<Tensor>& class_weight,
                       const std::optional<Tensor>& scale, const Tensor& loss, int64_t ignore_index,
                       double smoothing, double z_loss, double softcap) {
  STD_TORCH_CHECK(logits.dim() > 0 && logits.size(-1) > 0, "logits must be [..., V] with V > 0");
  const int64_t classes = logits.size(-1);
  STD_TORCH_CHECK(cuda::same_place(target, logits) && target.scalar_type() == ScalarType::Long &&
                      target.dim() == logits.dim() - 1 &&
                      target.numel() * classes == logits.numel(),
                  "target must be int64 [...] on the device of the logits");
  check_floats(class_weight, classes, logits);
  check_floats(scale, target.numel(), logits);
  return {logits.const_data_ptr(),
          static_cast<const int64_t*>(target.const_data_ptr()),
          static_cast<const float*>(data_or_null(class_weight)),
          static_cast<const float*>(data_or_null(scale)),
          static_cast<float*>(loss.mutable_data_ptr()),
          nullptr,
          target.numel(),
          classes,
          ignore_index,
          1.0f,
          static_cast<float>(classes),
          static_cast<float>(smoothing),
          static_cast<float>(z_loss),
          static_cast<float>(softcap),
          false,
          dtype_of(logits)};
}

// Returns the loss, reduced or per token [rows], and with `gradient` the gradient of that scalar
// (of the sum where it is not reduced), else an empty tensor.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_, const Tensor& target_,
                                         const std::optional<Tensor>& class_weight,
                                         const std::optional<Tensor>& token_weight,
                                         int64_t ignore_index, double smoothing, double z_loss,
                                         double softcap, int64_t reduction, bool gradient) {
  const cuda::OnDevice device(logits_);
  const Tensor logits = dense(logits_), target = dense(target_);
  Tensor loss = device.empty({target.numel()}, ScalarType::Float);
  CrossEntropy args = arguments(logits, target, class_weight, token_weight, loss, ignore_index,
                                smoothing, z_loss, softcap);
  Tensor grad = gradient ? device.empty_like(logits) : device.empty({0}, logits.scalar_type());
  if (gradient) args.grad = grad.mutable_data_ptr();
  Tensor work = device.empty({2}, ScalarType::Float);
  Tensor out = reduction == kNone ? loss : device.empty({}, ScalarType::Float);
  const cuda::CrossEntropyLaunch more{
      static_cast<float*>(work.mutable_data_ptr()),
      reduction == kNone ? nullptr : static_cast<float*>(out.mutable_data_ptr()),
      reduction == kMean};
  cuda::check(cuda::cross_entropy(args, more, device.stream()), "cross_entropy");
  return {out, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("cross_entropy", TORCH_BOX(&cross_entropy)); }

}  // namespace fastlm
