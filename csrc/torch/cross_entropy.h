// What cross_entropy and linear_cross_entropy share: the arguments of the kernel, checked, and its
// run over the rows.
#pragma once
#include "ops/cross_entropy.h"

#include <memory>

#include "cpu/isa.h"
#include "torch/alloc.h"

FASTLM_KERNEL_TABLE(CrossEntropyKernels, cross_entropy)

namespace fastlm {

enum Reduction : int64_t { kNone, kMean, kSum };

struct CrossEntropyOptions {
  int64_t ignore_index;
  double smoothing, z_loss, softcap;
};

// The checks that keep a kernel from reading the wrong memory; the Python side words them better.
inline void check_targets(const Tensor& target, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.is_cpu() && target.scalar_type() == ScalarType::Long,
                  "target must be int64 on the CPU");
  const auto* targets = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t rows = target.numel();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = targets[r];
    STD_TORCH_CHECK(t == ignore_index || (t >= 0 && t < classes),
                    "cross_entropy: target must be in [0, ", classes, ") or ignore_index ",
                    ignore_index, ", got ", t, " at position ", r);
  }
}

inline const float* floats(const std::optional<Tensor>& t, int64_t count) {
  STD_TORCH_CHECK(!t || (t->is_cpu() && t->scalar_type() == ScalarType::Float &&
                         t->is_contiguous() && t->numel() == count),
                  "weights must be contiguous, fp32, on the CPU, and one per class or token");
  return static_cast<const float*>(data_or_null(t));
}

// The arguments for contiguous targets that were checked; logits, loss and gradient are still to
// come.
inline CrossEntropy cross_entropy_arguments(const int64_t* target, int64_t rows, int64_t classes,
                                            const float* class_weight, const float* scale,
                                            const CrossEntropyOptions& options, DType dtype) {
  double sum = class_weight == nullptr ? static_cast<double>(classes) : 0.0;
  for (int64_t c = 0; class_weight != nullptr && c < classes; ++c) sum += class_weight[c];
  return {nullptr,
          target,
          class_weight,
          scale,
          nullptr,
          nullptr,
          rows,
          classes,
          options.ignore_index,
          1.0f,
          static_cast<float>(sum),
          static_cast<float>(options.smoothing),
          static_cast<float>(options.z_loss),
          static_cast<float>(options.softcap),
          false,
          dtype};
}

// What a token's loss counts for, and what the mean divides by.
inline float token_weight(const CrossEntropy& args, int64_t r) {
  return args.target[r] == args.ignore_index ? 0.0f : args.scale == nullptr ? 1.0f : args.scale[r];
}
inline double mean_divisor(const CrossEntropy& args) {
  double count = 0.0;
  for (int64_t r = 0; r < args.rows; ++r) {
    const bool weighted = args.class_weight != nullptr && args.target[r] != args.ignore_index;
    count += token_weight(args, r) * (weighted ? args.class_weight[args.target[r]] : 1.0f);
  }
  return count;
}

inline void run_cross_entropy(const CrossEntropy& args) {
  const auto kernel = cross_entropy_kernels().rows;
  // a value costs as much as eight bytes of traffic
  parallel_rows(args.rows, args.classes * 8, [&](int64_t begin, int64_t end) {
    const int64_t count = args.grad == nullptr ? 0 : cross_entropy_scratch(args.classes);
    const std::unique_ptr<float[]> scratch(count ? new float[static_cast<size_t>(count)] : nullptr);
    kernel(args, scratch.get(), begin, end);
  });
}

// Weighs the tokens' losses and returns their sum, in the order of the tokens.
inline double weigh_losses(const CrossEntropy& args) {
  double total = 0.0;
  for (int64_t r = 0; r < args.rows; ++r) {
    if (args.scale != nullptr) args.loss[r] *= token_weight(args, r);
    total += args.loss[r];
  }
  return total;
}

}  // namespace fastlm
