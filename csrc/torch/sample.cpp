// Binding of sample: allocates, splits rows over threads, registers.
#include "ops/sample.h"

#include <atomic>

#include "cpu/isa.h"
#include "torch/alloc.h"

FASTLM_KERNEL_TABLE(SampleKernels, sample)

namespace fastlm {
namespace {

Tensor sample(const Tensor& logits_, const Tensor& uniform_, double temperature, int64_t top_k,
              double top_p, double min_p) {
  STD_TORCH_CHECK(logits_.dim() == 2 && logits_.size(1) > 0, "logits must be [B, V]");
  STD_TORCH_CHECK(uniform_.scalar_type() == ScalarType::Double && uniform_.is_cpu() &&
                      uniform_.numel() == logits_.size(0),
                  "uniform must be [B] of float64");
  const Tensor logits = unit_stride(logits_), uniform = dense(uniform_);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Tensor token = empty_cpu({rows}, ScalarType::Long);
  const SampleKernels& kernels = sample_kernels();
  const int64_t room = kernels.scratch(vocab);
  const int64_t workers = std::min<int64_t>(rows, torch::stable::get_num_threads());
  const Tensor memory = empty_cpu({workers * room}, ScalarType::Float);
  auto* scratch = static_cast<float*>(memory.mutable_data_ptr());
  const Sample args{logits.const_data_ptr(),
                    static_cast<const double*>(uniform.const_data_ptr()),
                    static_cast<int64_t*>(token.mutable_data_ptr()),
                    rows,
                    vocab,
                    logits.stride(0),
                    std::min(top_k, vocab),
                    static_cast<float>(temperature),
                    top_p,
                    min_p,
                    dtype_of(logits)};
  std::atomic<int64_t> next{0}, wrong{-1};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t row = next++; row < rows; row = next++) {
        if (!kernels.forward(args, row, scratch + w * room)) wrong = row;
      }
    }
  };
  if (workers <= 1) {
    work(0, workers);
  } else {
    torch::stable::parallel_for(0, workers, 1, work);
  }
  STD_TORCH_CHECK(wrong < 0, "sample: logits must be finite or -inf, one of them finite, in row ",
                  wrong.load());
  return token;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace fastlm
