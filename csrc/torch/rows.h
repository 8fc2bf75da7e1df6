// How bindings see tensors: as rows, or as one row where nothing has gaps.
#pragma once
#include "torch/alloc.h"

namespace fastlm {

// A tensor as rows with one stride between them: halves of a chunked tensor are read where they
// lie. What cannot be seen so is copied.
struct RowView {
  Tensor tensor;
  int64_t stride;
};

inline RowView row_view(const Tensor& t) {
  const int64_t dims = t.dim(), cols = dims == 0 ? 1 : t.size(-1);
  if (t.is_contiguous()) return {t, cols};
  bool regular = t.stride(dims - 1) == 1;
  for (int64_t d = 0; d + 2 < dims; ++d) {
    regular &= t.stride(d) == t.stride(d + 1) * t.size(d + 1);
  }
  if (regular && dims >= 2) return {t, t.stride(dims - 2)};
  return {torch::stable::contiguous(t), cols};
}

// RowView of `cols` elements where some input has gaps, else one row of everything.
struct RowShape {
  int64_t rows, cols;
  RowShape(const Tensor& like, int64_t cols_, bool gaps) : rows(1), cols(like.numel()) {
    if (!gaps) return;
    cols = cols_;
    rows = cols == 0 ? 0 : like.numel() / cols;
  }
};

inline int64_t last_size(const Tensor& t) { return t.dim() == 0 ? 1 : t.size(-1); }

inline const void* data_at(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * t.element_size();
}

}  // namespace fastlm
