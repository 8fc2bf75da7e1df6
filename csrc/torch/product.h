// What the bindings with a matrix product share: checks, the output's shape, the split of the work.
#pragma once
#include "torch/alloc.h"

namespace fastlm {

// The checks that keep a product from reading the wrong memory; the Python side words them better.
inline void check_product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1),
                  "w must be [N, K] for x [..., K]");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type() && w.is_cpu(), "w must be like x");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0) && bias->is_cpu() &&
                            bias->scalar_type() == x.scalar_type()),
                  "bias must be [N] and like x");
}

// A fresh contiguous CPU tensor [..., out] for x [..., in].
inline Tensor empty_cpu_rows(const Tensor& x, int64_t out) {
  int64_t sizes[16], strides[16], stride = 1;
  const auto given = x.sizes();
  const int64_t dims = static_cast<int64_t>(given.size());
  STD_TORCH_CHECK(dims <= 16, "at most 16 dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? out : given[d];
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides,
                                                  static_cast<int32_t>(x.scalar_type()),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Runs f over the panels of a product [rows, in] x [out, in]^T; a panel's cost is its weights'
// traffic, or its arithmetic where there are more than about 8 rows.
template <class F>
void parallel_panels(int64_t rows, int64_t in, int64_t out, int64_t panel, DType dtype, const F& f,
                     int64_t weights = 1) {
  const int64_t panels = rows == 0 ? 0 : (out + panel - 1) / panel;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  parallel_rows(panels, panel * in * size * weights * (1 + rows / 8), f);
}

}  // namespace fastlm
