// Binding of sample: splits rows over threads, registers the CPU kernel.
#include "torch/sample.h"

#include <atomic>

#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(SampleKernels, sample)

namespace fastlm {
namespace {

struct OnCpu {
  explicit OnCpu(const Tensor&) {}
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty_cpu(sizes, dtype);
  }
  void run(const Sample& args) const {
    const SampleKernels& kernels = sample_kernels();
    const int64_t room = kernels.scratch(args.vocab);
    const int64_t workers = std::min<int64_t>(args.rows, torch::stable::get_num_threads());
    const Tensor memory = empty_cpu({workers * room}, ScalarType::Float);
    auto* scratch = static_cast<float*>(memory.mutable_data_ptr());
    std::atomic<int64_t> next{0}, wrong{-1};
    const auto work = [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t row = next++; row < args.rows; row = next++) {
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
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("sample", TORCH_BOX(&sample<OnCpu>)); }

}  // namespace fastlm
