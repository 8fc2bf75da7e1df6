// What every CUDA binding needs: the tensor's device made current, its stream, fresh memory there.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "torch/alloc.h"
#include "torch/cuda/stream.h"

namespace fastlm::cuda {

// cudaGetErrorString, defined beside the kernels: bindings do not see the CUDA runtime.
const char* error_text(int status);

// The stream PyTorch queues work on.
inline void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto get = reinterpret_cast<Getter>(
      loaded_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "fastlm: this build of PyTorch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// Makes t's device the current one while it lives; knows the stream PyTorch queues work on there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
      : index_(index_of(t)), guard_(index_), stream_(current_stream(index_)) {}

  void* stream() const { return stream_; }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty_dense(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype,
                       aoti_torch_device_type_cuda(), index_);
  }
  int32_t index() const { return index_; }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
  Tensor empty_like(const Tensor& t) const {
    const auto sizes = t.sizes();
    return empty_dense(sizes.data(), static_cast<int64_t>(sizes.size()), t.scalar_type(),
                       aoti_torch_device_type_cuda(), index_);
  }

 private:
  static int32_t index_of(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "fastlm: expected a tensor on a GPU, like the others");
    return t.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// Whether two tensors lie on one device: a kernel that is given others reads the wrong memory.
inline bool same_place(const Tensor& a, const Tensor& b) {
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Raises where a launcher returned an error.
inline void check(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": CUDA error: ", error_text(status));
}

}  // namespace fastlm::cuda
