// Binding of linear_cross_entropy's products: a chunk's logits and its gradients, into memory that
// the loop over the chunks (fastlm/ops/linear_cross_entropy.py) uses again and again.
#include "ops/linear_cross_entropy.h"

#include <memory>

#include "cpu/isa.h"
#include "torch/product.h"

FASTLM_KERNEL_TABLE(LinearCrossEntropyKernels, linear_cross_entropy)
FASTLM_KERNEL_TABLE(LinearKernels, linear)

namespace fastlm {
namespace {

constexpr int64_t kBlockFloats = 160 << 10;  // a packed block stays in L2
constexpr int64_t kItems = 8;                // at least so many, where there are the columns

void check_matrix(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu() && t.scalar_type() == dtype, "expected a matrix");
}

// out [rows, V] = x [rows, H] weight^T + bias
void logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  check_product(x, weight, bias);
  check_matrix(out, x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && out.is_contiguous() &&
                      out.size(0) == x.size(0) && out.size(1) == weight.size(0),
                  "out must be [rows, V]");
  run_product(linear_kernels(), x.const_data_ptr(), x.size(0), weight, dense(bias),
              out.mutable_data_ptr());
}

// sums [m, n] = a^T b, or += where `add`, for a [k, m], transposed or not, and b [k, n].
void column_product(const Tensor& a, const Tensor& b, Tensor sums, bool add) {
  check_matrix(a, b.scalar_type());
  check_matrix(b, a.scalar_type());
  check_matrix(sums, ScalarType::Float);
  const LinearCrossEntropyKernels& kernels = linear_cross_entropy_kernels();
  const int64_t k = a.size(0), m = a.size(1), n = b.size(1);
  STD_TORCH_CHECK(k > 0 && b.size(0) == k && (b.stride(1) == 1 || n <= 1), "b must be [k, n]");
  STD_TORCH_CHECK(a.stride(0) == 1 || a.stride(1) == 1, "a must be [k, m] or transposed");
  STD_TORCH_CHECK(sums.is_contiguous() && sums.size(0) == m && sums.size(1) == n,
                  "sums must be [m, n]");

  const int64_t panels = (m + kernels.panel - 1) / kernels.panel;
  const int64_t tiles = (n + kernels.tile - 1) / kernels.tile;
  const int64_t most = std::max<int64_t>(kBlockFloats / 256 / kernels.tile, 1);
  int64_t blocks =
      std::max((tiles + most - 1) / most, (kItems + panels - 1) / std::max<int64_t>(panels, 1));
  blocks = std::clamp<int64_t>(blocks, 1, std::max<int64_t>(tiles, 1));
  const int64_t width = (tiles + blocks - 1) / blocks * kernels.tile;
  const ColumnProduct args{a.const_data_ptr(),
                           b.const_data_ptr(),
                           static_cast<float*>(sums.mutable_data_ptr()),
                           m,
                           n,
                           k,
                           a.stride(0),
                           a.stride(1),
                           b.stride(0),
                           width,
                           add,
                           dtype_of(a)};
  const int64_t items = n == 0 ? 0 : panels * ((n + width - 1) / width);
  parallel_rows(items, kernels.panel * width * k / 4, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(kernels.scratch(width))]);
    kernels.product(args, scratch.get(), begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear_cross_entropy_logits", TORCH_BOX(&logits));
  m.impl("linear_cross_entropy_product", TORCH_BOX(&column_product));
}

}  // namespace fastlm
