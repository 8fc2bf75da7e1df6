// Stands in for csrc/torch/cuda/device.h: CPU memory, and registration for CPU tensors.
#pragma once
#include "torch/alloc.h"

#define CUDA CPU  // STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m)

namespace fastlm::cuda {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty_cpu(sizes, dtype);
  }
  Tensor empty_like(const Tensor& t) const { return empty_cpu_like(t); }
};

inline bool same_place(const Tensor& a, const Tensor& b) { return a.is_cpu() && b.is_cpu(); }

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline void check(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": launch failed");
}

}  // namespace fastlm::cuda
