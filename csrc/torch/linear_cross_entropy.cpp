// Binding of linear_cross_entropy: the loop over chunks of rows. A chunk's logits are made, turned
// into their own gradient where they lie, and taken on to the gradients of x, weight and bias.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "torch/cross_entropy.h"
#include "torch/product.h"

FASTLM_KERNEL_TABLE(LinearKernels, linear)

namespace fastlm {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // of logits

// ---- products ----

// PyTorch's own, through the C shims that stay the same from version to version.
void library_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
void library_product(const Tensor& add, const Tensor& a, const Tensor& b, double beta,
                     const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, 1.0));
}

// sums [m, n] = a^T b, or += where `add`, for a [k, m], transposed or not, and b [k, n].
void column_product(const Tensor& a, const Tensor& b, const Tensor& sums, bool add) {
  const Operand left{a.const_data_ptr(), a.stride(1), a.stride(0)};
  const Operand right{b.const_data_ptr(), 1, b.stride(0)};
  run_many_rows(linear_kernels(), {left, right, nullptr, sums.mutable_data_ptr(), a.size(1),
                                   b.size(1), a.size(0), b.size(1), add, true, dtype_of(a)});
}

// sums[c] += sum_r matrix[r, c]
template <class T>
void add_rows(const Tensor& matrix, double* sums) {
  constexpr int64_t kBlock = 512;
  const auto* p = static_cast<const T*>(matrix.const_data_ptr());
  const int64_t rows = matrix.size(0), cols = matrix.size(1);
  parallel_rows((cols + kBlock - 1) / kBlock, rows * kBlock * 8, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlock, cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = begin * kBlock; c < last; ++c) sums[c] += to_float(p[r * cols + c]);
    }
  });
}

// The first `rows` rows of a matrix, from `start` on.
Tensor part(const Tensor& t, int64_t start, int64_t rows) {
  return rows == t.size(0) ? t : torch::stable::narrow(const_cast<Tensor&>(t), 0, start, rows);
}

// The gradients of one call, fp32, where they are wanted.
struct Gradients {
  Tensor x, weight;  // [rows, H] and [V, H]
  std::vector<double> bias;
  bool wants_x, wants_weight, wants_bias;

  bool any() const { return wants_x || wants_weight || wants_bias; }

  // Takes the gradient of a chunk's logits on, for the rows of x from `start` on.
  void add(const Tensor& logits, const Tensor& rows, const Tensor& weights, int64_t start,
           bool library) {
    const bool exact = logits.scalar_type() == ScalarType::Float;
    const bool half = logits.scalar_type() == ScalarType::Half;  // whose sums may leave its range
    const int64_t count = rows.size(0);
    if (wants_x) {
      const Tensor sums = part(x, start, count);
      if (exact && library) {
        library_product(logits, weights, sums);
      } else if (library && !half) {
        Tensor rounded = empty_cpu({count, weights.size(1)}, logits.scalar_type()), to = sums;
        library_product(logits, weights, rounded);
        torch::stable::copy_(to, rounded);
      } else if (exact && count <= kLinearFewRows) {
        run_few_rows(linear_kernels(), logits.const_data_ptr(), count,
                     torch::stable::transpose(weights, 0, 1), std::nullopt,
                     sums.mutable_data_ptr());
      } else {
        column_product(torch::stable::transpose(logits, 0, 1), weights, sums, false);
      }
    }
    if (wants_weight) {
      if (library && exact) {
        library_product(weight, torch::stable::transpose(logits, 0, 1), rows, start > 0, weight);
      } else {  // the library would round every chunk's part
        column_product(logits, rows, weight, start > 0);
      }
    }
    if (wants_bias) {
      with_element(logits, [&]<class T>(T*) { add_rows<T>(logits, bias.data()); });
    }
  }
};

// ---- tokens without loss ----

// The rows that have a loss: the others cost nothing.
class Kept {
 public:
  Kept(const Tensor& target, int64_t ignore_index) : rows_(target.numel()) {
    const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
    all_ = std::find(t, t + rows_, ignore_index) == t + rows_;
    for (int64_t r = 0; !all_ && r < rows_; ++r) {
      if (t[r] != ignore_index) index_.push_back(r);
    }
  }

  Tensor gather(const Tensor& t) const {
    if (all_) return t;
    Tensor out = like(t, static_cast<int64_t>(index_.size()));
    const char* from = static_cast<const char*>(t.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    each(t, [&](int64_t i, int64_t at, size_t bytes) {
      memcpy(to + i * bytes, from + at * bytes, bytes);
    });
    return out;
  }

  // The rest is zero.
  Tensor scatter(const Tensor& t) const {
    if (all_) return t;
    Tensor out = like(t, rows_);
    const char* from = static_cast<const char*>(t.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    memset(to, 0, static_cast<size_t>(out.numel()) * out.element_size());
    each(t, [&](int64_t i, int64_t at, size_t bytes) {
      memcpy(to + at * bytes, from + i * bytes, bytes);
    });
    return out;
  }

 private:
  static Tensor like(const Tensor& t, int64_t rows) {
    return t.dim() == 1 ? empty_cpu({rows}, t.scalar_type())
                        : empty_cpu({rows, t.size(1)}, t.scalar_type());
  }
  template <class F>
  void each(const Tensor& t, const F& f) const {
    const size_t bytes = static_cast<size_t>(t.dim() == 1 ? 1 : t.size(1)) * t.element_size();
    parallel_rows(static_cast<int64_t>(index_.size()), 2 * static_cast<int64_t>(bytes),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      f(i, index_[static_cast<size_t>(i)], bytes);
                    }
                  });
  }

  int64_t rows_;
  bool all_;
  std::vector<int64_t> index_;
};

// ---- the loop ----

// x [rows, H], weight [V, H] -> loss, reduced or per token [rows], and where wanted the gradients
// of x, weight and bias of that scalar (of the sum where it is not reduced) in fp32, else empty.
// `library` takes PyTorch's products where they keep fp32 sums.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& x, const Tensor& weight_, const Tensor& target_,
    const std::optional<Tensor>& bias_, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& scale_, int64_t ignore_index, double smoothing, double z_loss,
    double softcap, int64_t reduction, bool dx, bool dweight, bool dbias, int64_t chunk_rows,
    bool library) {
  STD_TORCH_CHECK(x.dim() == 2 && target_.dim() == 1 && target_.size(0) == x.size(0) &&
                      (!scale_ || scale_->dim() == 1) && chunk_rows > 0,
                  "x must be [rows, H], target and token_weight [rows]");
  check_product(x, weight_, bias_);
  const ScalarType dtype = x.scalar_type();
  const int64_t all_rows = x.size(0), width = x.size(1), classes = weight_.size(0);
  const Tensor weight = unit_stride(weight_), every_target = dense(target_);
  const std::optional<Tensor> bias = dense(bias_);
  check_targets(every_target, classes, ignore_index);
  floats(scale_, all_rows);

  const Kept kept(every_target, ignore_index);
  const Tensor rows = kept.gather(dense(x)), target = kept.gather(every_target);
  const std::optional<Tensor> scale =
      scale_ ? std::optional<Tensor>(kept.gather(*scale_)) : std::nullopt;
  const int64_t count = rows.size(0);

  const CrossEntropyOptions options{ignore_index, smoothing, z_loss, softcap};
  CrossEntropy whole = cross_entropy_arguments(static_cast<const int64_t*>(target.const_data_ptr()),
                                               count, classes, floats(class_weight, classes),
                                               floats(scale, count), options, dtype_of(x));
  const double divisor = reduction == kMean ? mean_divisor(whole) : 1.0;
  whole.factor = static_cast<float>(1.0 / divisor);
  Tensor losses = empty_cpu({count}, ScalarType::Float);
  whole.loss = static_cast<float*>(losses.mutable_data_ptr());

  const auto fresh = [&](bool wanted, int64_t m) {
    Tensor t =
        wanted ? empty_cpu({m, width}, ScalarType::Float) : empty_cpu({0}, ScalarType::Float);
    return count == 0 ? torch::stable::zero_(t) : t;
  };
  Gradients gradients{fresh(dx, count),
                      fresh(dweight, classes),
                      std::vector<double>(dbias ? static_cast<size_t>(classes) : 0),
                      dx,
                      dweight,
                      dbias};

  // chunks of equal size, as many rows as the memory allows
  const int64_t row_bytes = classes * static_cast<int64_t>(x.element_size());
  const int64_t most = std::min(std::max<int64_t>(kChunkBytes / row_bytes, 16), chunk_rows);
  const int64_t chunks = std::max<int64_t>((count + most - 1) / most, 1);
  const int64_t size = ((count + chunks - 1) / chunks + 15) / 16 * 16;
  const Tensor buffer = empty_cpu({std::min(size, count), classes}, dtype);
  for (int64_t start = 0; start < count; start += size) {
    const int64_t n = std::min(size, count - start);
    const Tensor logits = part(buffer, 0, n), these = part(rows, start, n);
    if (!library) {
      run_product(linear_kernels(), operand(these), n, weight, bias, logits.mutable_data_ptr());
    } else if (bias) {
      library_product(*bias, these, torch::stable::transpose(weight, 0, 1), 1.0, logits);
    } else {
      library_product(these, torch::stable::transpose(weight, 0, 1), logits);
    }
    CrossEntropy args = whole;
    args.rows = n;
    args.target += start;
    args.loss += start;
    if (args.scale != nullptr) args.scale += start;
    args.logits = logits.const_data_ptr();
    if (gradients.any()) args.grad = logits.mutable_data_ptr();
    run_cross_entropy(args);
    gradients.add(logits, these, weight, start, library);
  }

  const double total = weigh_losses(whole);
  Tensor loss = losses;
  if (reduction != kNone) {
    loss = empty_cpu({}, ScalarType::Float);
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / divisor);
  } else {
    loss = kept.scatter(losses);
  }
  Tensor made_bias = empty_cpu({dbias ? classes : 0}, ScalarType::Float);
  std::transform(gradients.bias.begin(), gradients.bias.end(),
                 static_cast<float*>(made_bias.mutable_data_ptr()),
                 [](double v) { return static_cast<float>(v); });
  if (dx) gradients.x = kept.scatter(gradients.x);
  return {loss, gradients.x, gradients.weight, made_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace fastlm
