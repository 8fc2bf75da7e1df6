// Stands in for csrc/torch/cuda/device.h: CPU memory, and registration for CPU tensors. A kernel
// may touch the tensors whose pointers its binding takes, and write to those it takes as mutable:
// the compiler's command line renames the functions of the C shim that hand pointers out.
#pragma once
#include <string>

#include "memory.h"
#include "torch/alloc.h"

#define CUDA CPU  // STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m)

namespace emulator {

// Allows what lies between the first and the last element of a tensor.
inline void allow(AtenTensorHandle tensor, const void* data, bool writable) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  int64_t elements = 1;
  std::string what = "tensor [";
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return;
    elements += (sizes[d] - 1) * strides[d];
    what += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  }
  const auto bytes = static_cast<size_t>(elements) * aoti_torch_dtype_element_size(dtype);
  allow(data, bytes, writable, (what + "]").c_str());
}

}  // namespace emulator

extern "C" {
AOTITorchError real_const_data_ptr(AtenTensorHandle,
                                   const void**) __asm__("torch_get_const_data_ptr");
AOTITorchError real_mutable_data_ptr(AtenTensorHandle,
                                     void**) __asm__("torch_get_mutable_data_ptr");
AOTITorchError emulated_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError status = real_const_data_ptr(tensor, data);
  emulator::allow(tensor, *data, false);
  return status;
}
AOTITorchError emulated_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = real_mutable_data_ptr(tensor, data);
  emulator::allow(tensor, *data, true);
  return status;
}
}

namespace fastlm::cuda {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  ~OnDevice() { emulator::forget_all(); }
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
