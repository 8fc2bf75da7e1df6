// What every binding needs of a tensor: cheap allocation, element type, pointers, parallel loops.
//
// Arguments were checked in Python (fastlm/ops/X.py), where the message can name the user's
// argument; a binding only asserts what would make it read the wrong memory.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/convert.h"

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// Calls f with a pointer to t's elements.
template <class F>
void with_element(const Tensor& t, F&& f) {
  switch (dtype_of(t)) {
    case DType::kFloat32:
      return f(static_cast<float*>(t.mutable_data_ptr()));
    case DType::kBFloat16:
      return f(static_cast<bf16*>(t.mutable_data_ptr()));
    case DType::kFloat16:
      return f(static_cast<fp16*>(t.mutable_data_ptr()));
  }
}

// Fresh memory is mapped page by page at first touch, which for large outputs costs more than the
// kernel; asking for 2 MiB pages makes that twice to four times as fast. Advice only: where the
// system has no such pages nothing changes.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A fresh tensor with the caller's dense strides through the C shim: 0.5 us on CPU, half of
// torch::stable::new_empty.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims,
                            ScalarType dtype, int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                  device_type, device_index, &handle));
  Tensor t(handle);
  const int64_t count = t.numel();
  if (count >= 1 << 20 && device_type == aoti_torch_device_type_cpu()) {
    advise_huge_pages(t.mutable_data_ptr(), static_cast<size_t>(count) * t.element_size());
  }
  return t;
}

// A fresh contiguous tensor.
inline Tensor empty_dense(const int64_t* sizes, int64_t dims, ScalarType dtype, int32_t device_type,
                          int32_t device_index) {
  int64_t strides[16], stride = 1;
  STD_TORCH_CHECK(dims <= 16, "at most 16 dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, dims, dtype, device_type, device_index);
}

// A fresh contiguous CPU tensor.
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_dense(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype,
                     aoti_torch_device_type_cpu(), 0);
}

// A fresh contiguous CPU tensor of t's shape and type, whatever t's strides.
inline Tensor empty_cpu_like(const Tensor& t) {
  const auto sizes = t.sizes();
  return empty_dense(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type(),
                     aoti_torch_device_type_cpu(), 0);
}

// A fresh contiguous tensor [..., out] of x's type for x [..., in].
inline Tensor empty_rows(const Tensor& x, int64_t out, int32_t device_type, int32_t device_index) {
  int64_t sizes[16];
  const auto given = x.sizes();
  STD_TORCH_CHECK(given.size() <= 16, "at most 16 dimensions");
  std::copy(given.begin(), given.end(), sizes);
  sizes[given.size() - 1] = out;
  return empty_dense(sizes, static_cast<int64_t>(given.size()), x.scalar_type(), device_type,
                     device_index);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// t itself where it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// t itself where its last dimension lies densely, else a contiguous copy.
inline Tensor unit_stride(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}
inline DType dtype_or_float(const std::optional<Tensor>& t) {
  return t.has_value() ? dtype_of(*t) : DType::kFloat32;
}

// Runs f(begin, end) over [0, items) on PyTorch's threads; a task is worth at least
// `grain_bytes` of memory traffic, so that small inputs stay on the calling thread.
template <class F>
void parallel_rows(int64_t items, int64_t bytes_per_item, const F& f,
                   int64_t grain_bytes = 64 * 1024) {
  const int64_t grain = std::max<int64_t>(1, grain_bytes / std::max<int64_t>(1, bytes_per_item));
  if (items <= grain) {
    if (items > 0) f(0, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

// Sums fp32 partials [blocks, cols] over the blocks, in pairs, to a tensor [cols] of `dtype`.
inline Tensor sum_blocks(const Tensor& partial, ScalarType dtype) {
  const int64_t blocks = partial.size(0), cols = partial.size(1);
  Tensor out = empty_cpu({cols}, dtype);
  float* rows = static_cast<float*>(partial.mutable_data_ptr());
  for (int64_t step = 1; step < blocks; step *= 2) {
    for (int64_t b = 0; b + step < blocks; b += 2 * step) {
      float* sum = rows + b * cols;
      const float* other = sum + step * cols;
      for (int64_t i = 0; i < cols; ++i) sum[i] += other[i];
    }
  }
  with_element(out, [&](auto* to) {
    for (int64_t i = 0; i < cols; ++i) from_float(rows[i], to + i);
  });
  return out;
}

}  // namespace fastlm
