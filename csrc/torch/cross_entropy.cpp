// Binding of cross_entropy: checks, splits rows over threads, reduces, registers.
#include "ops/cross_entropy.h"

#include <memory>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "torch/alloc.h"

FASTLM_KERNEL_TABLE(CrossEntropyKernels, cross_entropy)

namespace fastlm {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

// Gradients beyond this many bytes are streamed: they would push everything else out of the cache.
constexpr int64_t kStreamBytes = 24 << 20;

const float* floats(const std::optional<Tensor>& t) {
  return static_cast<const float*>(data_or_null(t));
}

void check_floats(const std::optional<Tensor>& t, int64_t count) {
  STD_TORCH_CHECK(!t || (t->is_cpu() && t->scalar_type() == ScalarType::Float &&
                         t->is_contiguous() && t->numel() == count),
                  "weights must be contiguous, fp32, on the CPU, and one per class or token");
}

// The checks that keep a kernel from reading the wrong memory; the Python side words them better.
void check(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
           const std::optional<Tensor>& token_weight, int64_t ignore_index) {
  STD_TORCH_CHECK(logits.dim() > 0 && logits.size(-1) > 0, "logits must be [..., V] with V > 0");
  STD_TORCH_CHECK(target.is_cpu() && target.scalar_type() == ScalarType::Long &&
                      target.dim() == logits.dim() - 1,
                  "target must be int64 [...] on the CPU");
  for (int64_t d = 0; d < target.dim(); ++d) {
    STD_TORCH_CHECK(target.size(d) == logits.size(d), "target must be [...]");
  }
  const int64_t classes = logits.size(-1), rows = target.numel();
  check_floats(class_weight, classes);
  check_floats(token_weight, rows);
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = targets[r];
    STD_TORCH_CHECK(t == ignore_index || (t >= 0 && t < classes),
                    "cross_entropy: target must be in [0, ", classes, ") or ignore_index ",
                    ignore_index, ", got ", t, " at position ", r);
  }
}

float sum_of(const std::optional<Tensor>& weight, int64_t classes) {
  if (!weight) return static_cast<float>(classes);
  double sum = 0.0;
  for (int64_t c = 0; c < classes; ++c) sum += floats(weight)[c];
  return static_cast<float>(sum);
}

CrossEntropy arguments(const Tensor& logits, const Tensor& target,
                       const std::optional<Tensor>& class_weight,
                       const std::optional<Tensor>& scale, int64_t ignore_index, double smoothing,
                       double z_loss, double softcap) {
  const int64_t classes = logits.size(-1);
  return {logits.const_data_ptr(),
          static_cast<const int64_t*>(target.const_data_ptr()),
          floats(class_weight),
          floats(scale),
          nullptr,
          nullptr,
          target.numel(),
          classes,
          ignore_index,
          1.0f,
          sum_of(class_weight, classes),
          static_cast<float>(smoothing),
          static_cast<float>(z_loss),
          static_cast<float>(softcap),
          false,
          dtype_of(logits)};
}

void run(const CrossEntropy& args) {
  const auto kernel = cross_entropy_kernels().rows;
  // a value costs as much as eight bytes of traffic
  parallel_rows(args.rows, args.classes * 8, [&](int64_t begin, int64_t end) {
    const int64_t count = args.grad == nullptr ? 0 : cross_entropy_scratch(args.classes);
    const std::unique_ptr<float[]> scratch(count ? new float[static_cast<size_t>(count)] : nullptr);
    kernel(args, scratch.get(), begin, end);
  });
}

// Returns the loss, reduced or per token [rows], and with `gradient` the gradient of that scalar
// (of the sum where it is not reduced), else an empty tensor.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_, const Tensor& target_,
                                         const std::optional<Tensor>& class_weight,
                                         const std::optional<Tensor>& token_weight,
                                         int64_t ignore_index, double smoothing, double z_loss,
                                         double softcap, int64_t reduction, bool gradient) {
  const Tensor logits = dense(logits_), target = dense(target_);
  check(logits, target, class_weight, token_weight, ignore_index);
  CrossEntropy args = arguments(logits, target, class_weight, token_weight, ignore_index, smoothing,
                                z_loss, softcap);
  const int64_t rows = args.rows;
  const auto weight_of = [&](int64_t r) {
    return args.target[r] == ignore_index ? 0.0f : args.scale == nullptr ? 1.0f : args.scale[r];
  };

  double count = 1.0;  // what the sum is divided by
  if (reduction == kMean) {
    count = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      const bool weighted = args.class_weight != nullptr && args.target[r] != ignore_index;
      count += weight_of(r) * (weighted ? args.class_weight[args.target[r]] : 1.0f);
    }
  }
  args.factor = static_cast<float>(1.0 / count);

  Tensor grad = gradient ? empty_cpu_like(logits) : empty_cpu({0}, logits.scalar_type());
  if (gradient) {
    args.grad = grad.mutable_data_ptr();
    const int64_t row_bytes = args.classes * static_cast<int64_t>(logits.element_size());
    args.stream = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(args.grad) % 64 == 0 &&
                  rows * row_bytes > kStreamBytes;
  }
  Tensor out =
      reduction == kNone ? empty_cpu({rows}, ScalarType::Float) : empty_cpu({}, ScalarType::Float);
  std::vector<float> tokens(reduction == kNone ? 0 : static_cast<size_t>(rows));
  args.loss = reduction == kNone ? static_cast<float*>(out.mutable_data_ptr()) : tokens.data();
  run(args);

  double total = 0.0;  // in the order of the tokens
  for (int64_t r = 0; r < rows; ++r) {
    if (args.scale != nullptr) args.loss[r] *= weight_of(r);
    total += args.loss[r];
  }
  if (reduction != kNone) {
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(total / count);
  }
  return {out, grad};
}

// The loss of each row [rows]; with `gradient` the logits become the gradient of
// factor sum_r scale[r] loss[r]. For a loop over chunks of logits.
Tensor cross_entropy_chunk(Tensor logits, const Tensor& target,
                           const std::optional<Tensor>& class_weight,
                           const std::optional<Tensor>& scale, double factor, int64_t ignore_index,
                           double smoothing, double z_loss, double softcap, bool gradient) {
  STD_TORCH_CHECK(logits.is_contiguous() && target.is_contiguous(), "expected dense tensors");
  check(logits, target, class_weight, scale, ignore_index);
  CrossEntropy args =
      arguments(logits, target, class_weight, scale, ignore_index, smoothing, z_loss, softcap);
  args.factor = static_cast<float>(factor);
  Tensor out = empty_cpu({args.rows}, ScalarType::Float);
  args.loss = static_cast<float*>(out.mutable_data_ptr());
  if (gradient) args.grad = logits.mutable_data_ptr();
  run(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_chunk", TORCH_BOX(&cross_entropy_chunk));
}

}  // namespace fastlm
