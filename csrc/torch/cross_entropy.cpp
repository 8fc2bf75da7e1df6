// Binding of cross_entropy: checks the targets, splits rows over threads, reduces, registers.
#include "ops/cross_entropy.h"

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "torch/alloc.h"

FASTLM_KERNEL_TABLE(CrossEntropyKernels, cross_entropy)

namespace fastlm {
namespace {

enum Reduction : int64_t { kNone, kMean, kSum };

const float* floats(const std::optional<Tensor>& t) {
  return static_cast<const float*>(data_or_null(t));
}

float sum_of(const std::optional<Tensor>& weight, int64_t classes) {
  if (!weight) return static_cast<float>(classes);
  double sum = 0.0;
  for (int64_t c = 0; c < classes; ++c) sum += floats(weight)[c];
  return static_cast<float>(sum);
}

void check_targets(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = target[r];
    STD_TORCH_CHECK(t == ignore_index || (t >= 0 && t < classes),
                    "cross_entropy: target must be in [0, ", classes, ") or ignore_index ",
                    ignore_index, ", got ", t, " at position ", r);
  }
}

// Returns the loss, reduced or per token [rows], and what backward needs: [2 rows + 1] with the
// softmax of each row (largest logit, sum) and what a mean was divided by. One tensor, because an
// allocation costs as much as a small row.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits_, const Tensor& target_,
                                         const std::optional<Tensor>& class_weight_,
                                         const std::optional<Tensor>& token_weight_,
                                         int64_t ignore_index, double smoothing, double z_loss,
                                         int64_t reduction) {
  const Tensor logits = dense(logits_), target = dense(target_);
  const auto class_weight = dense(class_weight_), token_weight = dense(token_weight_);
  const int64_t classes = logits.size(-1), rows = target.numel();
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  check_targets(targets, rows, classes, ignore_index);

  const Tensor state = empty_cpu({2 * rows + 1}, ScalarType::Float);
  auto* softmax = static_cast<float*>(state.mutable_data_ptr());
  Tensor out =
      reduction == kNone ? empty_cpu({rows}, ScalarType::Float) : empty_cpu({}, ScalarType::Float);
  std::vector<float> tokens(reduction == kNone ? 0 : static_cast<size_t>(rows));
  float* loss = reduction == kNone ? static_cast<float*>(out.mutable_data_ptr()) : tokens.data();
  const CrossEntropyForward args{logits.const_data_ptr(),
                                 targets,
                                 floats(class_weight),
                                 loss,
                                 softmax,
                                 rows,
                                 classes,
                                 ignore_index,
                                 sum_of(class_weight, classes),
                                 static_cast<float>(smoothing),
                                 static_cast<float>(z_loss),
                                 dtype_of(logits)};
  const auto kernel = cross_entropy_kernels().forward;
  parallel_rows(rows, classes * 8, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  // fp64 sums in the order of the tokens
  double total = 0.0, count = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const float token = token_weight ? floats(token_weight)[r] : 1.0f;
    if (token_weight) loss[r] *= targets[r] == ignore_index ? 0.0f : token;
    if (targets[r] == ignore_index) continue;
    total += loss[r];
    count += token * (class_weight ? floats(class_weight)[targets[r]] : 1.0f);
  }
  softmax[2 * rows] = reduction == kMean ? static_cast<float>(count) : 1.0f;
  if (reduction != kNone) {
    *static_cast<float*>(out.mutable_data_ptr()) =
        static_cast<float>(reduction == kMean ? total / count : total);
  }
  return {out, state};
}

// grad: a scalar, or [rows] where the forward did not reduce.
Tensor cross_entropy_backward(const Tensor& grad_, const Tensor& logits_, const Tensor& target_,
                              const std::optional<Tensor>& class_weight_,
                              const std::optional<Tensor>& token_weight_, const Tensor& state,
                              int64_t ignore_index, double smoothing, double z_loss) {
  const Tensor grad = dense(grad_), logits = dense(logits_), target = dense(target_);
  const auto class_weight = dense(class_weight_), token_weight = dense(token_weight_);
  const int64_t classes = logits.size(-1), rows = target.numel();
  const auto* upstream = static_cast<const float*>(grad.const_data_ptr());
  const int64_t step = grad.dim() == 0 ? 0 : 1;
  const auto* softmax = static_cast<const float*>(state.const_data_ptr());
  const float d = softmax[2 * rows];
  std::vector<float> scale(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = upstream[r * step] / d * (token_weight ? floats(token_weight)[r] : 1.0f);
  }
  Tensor out = empty_cpu_like(logits);
  const CrossEntropyBackward args{logits.const_data_ptr(),
                                  static_cast<const int64_t*>(target.const_data_ptr()),
                                  floats(class_weight),
                                  softmax,
                                  scale.data(),
                                  out.mutable_data_ptr(),
                                  rows,
                                  classes,
                                  ignore_index,
                                  sum_of(class_weight, classes),
                                  static_cast<float>(smoothing),
                                  static_cast<float>(z_loss),
                                  dtype_of(logits)};
  const auto kernel = cross_entropy_kernels().backward;
  parallel_rows(rows, classes * 8, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace fastlm
