// Binding of feed_forward: checks and allocates, takes blocks of rows whose intermediates stay in
// cache, splits the weights' rows over threads.
#include "ops/feed_forward.h"

#include <tuple>

#include "torch/product.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(FeedForwardKernels, feed_forward)
FASTLM_KERNEL_TABLE(LinearKernels, linear)

namespace fastlm {
namespace {

// The first half of the block: what every call of the kernel over a block of rows shares.
struct Projections {
  Tensor w_in;
  std::optional<Tensor> w_gate, b_in, b_gate;
  Activation act;
};

Activation activation(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Activation::kRelu2), "unknown kind");
  return static_cast<Activation>(kind);
}

Projections projections(const Tensor& x, const Tensor& w_in, const std::optional<Tensor>& w_gate,
                        const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_gate,
                        int64_t kind) {
  check_product(x, w_in, b_in);
  if (w_gate) {
    check_product(x, *w_gate, b_gate);
    STD_TORCH_CHECK(w_gate->size(0) == w_in.size(0), "w_gate must be like w_in");
  }
  STD_TORCH_CHECK(w_gate || !b_gate, "b_gate without w_gate");
  Projections p{readable(w_in), w_gate, dense(b_in), dense(b_gate), activation(kind)};
  if (w_gate) p.w_gate = readable(*w_gate);
  return p;
}

Tensor empty_rows_of(int64_t rows, int64_t cols, const Tensor& like) {
  return empty_cpu({rows, cols}, like.scalar_type());
}

void run_pointwise(const FeedForwardPointwise& args) {
  constexpr int64_t kBlock = 4096;
  const auto kernel = feed_forward_kernels().pointwise;
  parallel_rows((args.count + kBlock - 1) / kBlock, kBlock * 16, [&](int64_t begin, int64_t end) {
    kernel(args, begin * kBlock, std::min(end * kBlock, args.count));
  });
}

// hidden [rows, out] of x [rows, in]; keeps the projections where up (and gate) are given.
void run_hidden(const Projections& p, const Operand& x, int64_t rows, void* hidden, void* up,
                void* gate) {
  const DType dtype = dtype_of(p.w_in);
  const int64_t in = p.w_in.size(1), out = p.w_in.size(0);
  const bool few = rows <= kLinearFewRows;
  if (few && (is_transposed(p.w_in) || (p.w_gate && is_transposed(*p.w_gate)))) {
    // linear's kernel reads transposed weights; the activation follows while hidden is in L1
    const LinearKernels& kernels = linear_kernels();
    Tensor own_up, own_gate;
    if (up == nullptr && p.w_gate)
      up = (own_up = empty_rows_of(rows, out, p.w_in)).mutable_data_ptr();
    if (up == nullptr) up = hidden;
    if (gate == nullptr) gate = hidden;
    run_few_rows(kernels, x.p, rows, p.w_in, p.b_in, up);
    if (p.w_gate) run_few_rows(kernels, x.p, rows, *p.w_gate, p.b_gate, gate);
    run_pointwise(
        {up, p.w_gate ? gate : nullptr, nullptr, hidden, nullptr, rows * out, p.act, dtype});
    return;
  }
  const Operand none{nullptr, 0, 0};
  const FeedForwardHidden args{x,
                               operand(p.w_in),
                               p.w_gate ? operand(*p.w_gate) : none,
                               data_or_null(p.b_in),
                               data_or_null(p.b_gate),
                               hidden,
                               up,
                               gate,
                               rows,
                               in,
                               out,
                               p.act,
                               dtype};
  const FeedForwardKernels& own = feed_forward_kernels();
  const int64_t weights = p.w_gate ? 2 : 1;
  if (few) {
    return parallel_panels(rows, in, out * weights, own.panel * weights, dtype,
                           [&](int64_t begin, int64_t end) { own.hidden(args, begin, end); });
  }
  // a gated tile has a vector of outputs twice
  const int64_t half = own.cols / 2, tiles = (out + half - 1) / half;
  const int64_t columns = p.w_gate ? tiles * own.cols : out;
  parallel_regions(rows, columns, in, own.rows, own.cols, own.scratch(args),
                   [&](const Region& r, float* scratch) { own.hidden_region(args, r, scratch); });
}

Tensor feed_forward(const Tensor& x_, const Tensor& w_in, const Tensor& w_out_,
                    const std::optional<Tensor>& w_gate, const std::optional<Tensor>& b_in,
                    const std::optional<Tensor>& b_out_, const std::optional<Tensor>& b_gate,
                    int64_t kind) {
  constexpr int64_t kMost = 1024;  // rows at a time: bounds the memory, not what packing costs
  const Projections p = projections(x_, w_in, w_gate, b_in, b_gate, kind);
  const Rows x = rows_of(x_);
  const int64_t wide = w_in.size(0), out = w_out_.size(0);
  Tensor y = empty_cpu_rows(x_, out);
  const int64_t blocks = std::max<int64_t>((x.count + kMost - 1) / kMost, 1);
  const int64_t block = (x.count + blocks - 1) / blocks;
  const Tensor hidden = empty_rows_of(block, wide, x_);
  check_product(hidden, w_out_, b_out_);
  const Tensor w_out = readable(w_out_);
  const auto b_out = dense(b_out_);
  const int64_t size = static_cast<int64_t>(x_.element_size());
  const Operand middle{hidden.const_data_ptr(), wide, 1};
  for (int64_t m = 0; m < x.count; m += block) {  // equal blocks: none of a few rows
    const int64_t some = std::min(block, x.count - m);
    const char* from = static_cast<const char*>(x.side.p) + m * x.side.along * size;
    char* to = static_cast<char*>(y.mutable_data_ptr()) + m * out * size;
    run_hidden(p, {from, x.side.along, x.side.deep}, some, hidden.mutable_data_ptr(), nullptr,
               nullptr);
    run_product(linear_kernels(), middle, some, w_out, b_out, to);
  }
  return y;
}

// (hidden, up, gate), the last empty without w_gate
std::tuple<Tensor, Tensor, Tensor> feed_forward_hidden(const Tensor& x_, const Tensor& w_in,
                                                       const std::optional<Tensor>& w_gate,
                                                       const std::optional<Tensor>& b_in,
                                                       const std::optional<Tensor>& b_gate,
                                                       int64_t kind) {
  const Projections p = projections(x_, w_in, w_gate, b_in, b_gate, kind);
  const Rows x = rows_of(x_);
  const int64_t wide = w_in.size(0);
  Tensor hidden = empty_cpu_rows(x_, wide), up = empty_cpu_rows(x_, wide);
  Tensor gate = w_gate ? empty_cpu_rows(x_, wide) : empty_cpu({0}, x_.scalar_type());
  if (x.count > 0) {
    run_hidden(p, x.side, x.count, hidden.mutable_data_ptr(), up.mutable_data_ptr(),
               w_gate ? gate.mutable_data_ptr() : nullptr);
  }
  return {hidden, up, gate};
}

void check_like(const Tensor& t, const Tensor& up) {
  STD_TORCH_CHECK(t.numel() == up.numel() && t.scalar_type() == up.scalar_type() && t.is_cpu(),
                  "expected a tensor like up");
}

Tensor feed_forward_activation(const Tensor& up_, const std::optional<Tensor>& gate_,
                               int64_t kind) {
  const Tensor up = dense(up_);
  const auto gate = dense(gate_);
  if (gate) check_like(*gate, up);
  Tensor hidden = empty_cpu_like(up);
  run_pointwise({up.const_data_ptr(), data_or_null(gate), nullptr, hidden.mutable_data_ptr(),
                 nullptr, up.numel(), activation(kind), dtype_of(up)});
  return hidden;
}

// (hidden, gradient of gate or an empty tensor); grad, of hidden, becomes the gradient of up
std::tuple<Tensor, Tensor> feed_forward_backward(Tensor grad, const Tensor& up_,
                                                 const std::optional<Tensor>& gate_, int64_t kind) {
  const Tensor up = dense(up_);
  const auto gate = dense(gate_);
  check_like(grad, up);
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  if (gate) check_like(*gate, up);
  Tensor hidden = empty_cpu_like(up);
  Tensor grad_gate = gate ? empty_cpu_like(up) : empty_cpu({0}, up.scalar_type());
  run_pointwise({up.const_data_ptr(), data_or_null(gate), grad.mutable_data_ptr(),
                 hidden.mutable_data_ptr(), grad_gate.mutable_data_ptr(), up.numel(),
                 activation(kind), dtype_of(up)});
  return {hidden, grad_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("feed_forward_hidden", TORCH_BOX(&feed_forward_hidden));
  m.impl("feed_forward_activation", TORCH_BOX(&feed_forward_activation));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
}

}  // namespace fastlm
