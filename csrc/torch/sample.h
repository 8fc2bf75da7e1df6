// sample's operator for any device: checks, allocation, contract. A Place is made from the tensor
// whose device runs it; it allocates there (`empty`) and runs the contract (`run`).
#pragma once
#include "ops/sample.h"

#include <algorithm>

#include "torch/alloc.h"

namespace fastlm {

template <class Place>
Tensor sample(const Tensor& logits_, const Tensor& uniform_, double temperature, int64_t top_k,
              double top_p, double min_p) {
  STD_TORCH_CHECK(logits_.dim() == 2 && logits_.size(1) > 0, "sample: logits must be [B, V]");
  const bool here = logits_.is_cpu() ? uniform_.is_cpu()
                                     : uniform_.is_cuda() && uniform_.get_device_index() ==
                                                                 logits_.get_device_index();
  STD_TORCH_CHECK(
      here && uniform_.scalar_type() == ScalarType::Double && uniform_.numel() == logits_.size(0),
      "sample: uniform must be [B] of float64 on the device of the logits");
  const Place place(logits_);
  const Tensor logits = unit_stride(logits_), uniform = dense(uniform_);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Tensor token = place.empty({rows}, ScalarType::Long);
  place.run(Sample{logits.const_data_ptr(), static_cast<const double*>(uniform.const_data_ptr()),
                   static_cast<int64_t*>(token.mutable_data_ptr()), rows, vocab, logits.stride(0),
                   std::min(top_k, vocab), static_cast<float>(temperature), top_p, min_p,
                   dtype_of(logits)});
  return token;
}

}  // namespace fastlm
