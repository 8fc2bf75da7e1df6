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
  int32_t index() const { return 0; }
  int32_t type() const { return aoti_torch_device_type_cpu(); }
  Tensor empty_like(const Tensor& t) const { return empty_cpu_like(t); }
};

inline bool same_place(const Tensor& a, const Tensor& b) { return a.is_cpu() && b.is_cpu(); }

inline void check(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": launch failed");
}

}  // namespace fastlm::cuda
