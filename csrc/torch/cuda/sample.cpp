// Binding of sample's CUDA kernel: checks, allocates, registers. Nothing waits for the device.
#include "ops/sample.h"

#include "torch/cuda/device.h"

namespace fastlm {
namespace {

Tensor sample(const Tensor& logits_, const Tensor& uniform_, double temperature, int64_t top_k,
              double top_p, double min_p) {
  STD_TORCH_CHECK(logits_.dim() == 2 && logits_.size(1) > 0 && logits_.size(1) < int64_t{1} << 32,
                  "sample: logits must be [B, V]");
  STD_TORCH_CHECK(cuda::same_place(uniform_, logits_) &&
                      uniform_.scalar_type() == ScalarType::Double &&
                      uniform_.numel() == logits_.size(0),
                  "sample: uniform must be [B] of float64 on the device of the logits");
  const cuda::OnDevice device(logits_);
  const Tensor logits = unit_stride(logits_), uniform = dense(uniform_);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Tensor token = device.empty({rows}, ScalarType::Long);
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
  cuda::check(cuda::sample(args, device.stream()), "sample");
  return token;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace fastlm
