// What the bindings with a matrix product share: checks, operands' layouts, the split of the work.
#pragma once
#include <cstdlib>
#include <memory>

#include "ops/linear.h"
#include "torch/alloc.h"

namespace fastlm {

// The checks that keep a product from reading the wrong memory; the Python side words them better.
inline void check_product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(w.dim() == 2 && x.dim() >= 1 && x.size(-1) == w.size(1),
                  "w must be [N, K] for x [..., K]");
  STD_TORCH_CHECK(x.scalar_type() == w.scalar_type() && w.is_cpu(), "w must be like x");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0) && bias->is_cpu() &&
                            bias->scalar_type() == x.scalar_type()),
                  "bias must be [N] and like x");
}

// A fresh contiguous CPU tensor [..., out] for x [..., in].
inline Tensor empty_cpu_rows(const Tensor& x, int64_t out) {
  return empty_rows(x, out, aoti_torch_device_type_cpu(), 0);
}

// Runs f over the panels of a product [rows, in] x [out, in]^T; a panel's cost is its weights'
// traffic, or its arithmetic where there are more than about 8 rows.
template <class F>
void parallel_panels(int64_t rows, int64_t in, int64_t out, int64_t panel, DType dtype,
                     const F& f) {
  const int64_t panels = rows == 0 ? 0 : (out + panel - 1) / panel;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  parallel_rows(panels, panel * in * size * (1 + rows / 8), f);
}

// ---- layouts ----

// Whether a matrix's rows lie densely; a dimension of size 1 may carry any stride.
inline bool has_dense_rows(const Tensor& w) { return w.stride(1) == 1 || w.size(1) == 1; }
inline bool is_transposed(const Tensor& w) { return !has_dense_rows(w) && w.stride(0) == 1; }

// The weights in a layout that the kernels read: unit stride in one dimension.
inline Tensor readable(const Tensor& w) {
  return has_dense_rows(w) || is_transposed(w) ? w : torch::stable::contiguous(w);
}

// A readable matrix as one side of a product.
inline Operand operand(const Tensor& t) {
  const bool dense = has_dense_rows(t);
  return {t.const_data_ptr(), dense ? t.stride(0) : 1, dense ? 1 : t.stride(1)};
}

inline int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// The rows of x [..., in], which are copied where the kernels cannot read them.
struct Rows {
  Tensor x;
  Operand side;
  int64_t count;
};
inline Rows rows_of(const Tensor& x) {
  const int64_t in = x.size(-1), count = rows_in(x);
  if (x.dim() == 2 && count > kLinearFewRows) {
    const Tensor t = readable(x);
    return {t, operand(t), count};
  }
  const Tensor t = dense(x);
  return {t, {t.const_data_ptr(), in, 1}, count};
}
// ---- a few rows: the weights where they lie ----

// y [rows, out] = x [rows, in] w^T + bias for readable w, contiguous x, y and bias.
inline void run_few_rows(const LinearKernels& kernels, const void* x, int64_t rows, const Tensor& w,
                         const std::optional<Tensor>& bias, void* y) {
  const int64_t stride_in = is_transposed(w) ? w.stride(1) : 1;
  const LinearForward args{x,         w.const_data_ptr(), data_or_null(bias), y,
                           rows,      w.size(1),          w.size(0),          w.stride(0),
                           stride_in, dtype_of(w)};
  parallel_panels(rows, args.in, args.out, kernels.panel, args.dtype,
                  [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

// ---- many rows: both sides packed ----

// Scratch memory that a thread keeps: a product of a millisecond should not wait for fresh pages.
inline float* scratch_memory(int64_t floats) {
  constexpr size_t kLine = 64;
  static thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + kLine - 1) / kLine * kLine;
    memory.reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
    size = memory ? floats : 0;
    STD_TORCH_CHECK(memory != nullptr, "no memory for a product's operands");
  }
  return memory.get();
}

// How a result is cut into one region a thread: `down` times `across`. A tile costs its arithmetic
// and a share of the packing of its rows and columns, which every region does for itself.
struct Grid {
  int64_t down, across;
};
inline Grid grid_for(int64_t m, int64_t n, int64_t rows, int64_t cols, int64_t threads) {
  const int64_t high = (m + rows - 1) / rows, wide = (n + cols - 1) / cols;
  Grid best{1, 1};
  double least = 1e300;
  for (int64_t down = 1; down <= std::min(threads, high); ++down) {
    const int64_t across = std::min(threads / down, wide);
    const int64_t r = (high + down - 1) / down * rows, c = (wide + across - 1) / across * cols;
    const double cost = static_cast<double>(r) * static_cast<double>(c) + 8.0 * (r + c);
    if (cost < least) least = cost, best = {down, across};
  }
  return best;
}

// Runs f(region, scratch) over a result [m, n] with k values summed, in regions of whole tiles of
// rows x cols, each with `floats` of scratch memory.
template <class F>
void parallel_regions(int64_t m, int64_t n, int64_t k, int64_t rows, int64_t cols, int64_t floats,
                      const F& f) {
  if (m == 0 || n == 0) return;
  constexpr double kGrain = 2e5;  // multiply-adds that are worth a thread
  const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const auto available = static_cast<double>(torch::stable::get_num_threads());
  const Grid grid =
      grid_for(m, n, rows, cols, static_cast<int64_t>(std::clamp(work / kGrain, 1.0, available)));
  const int64_t regions = grid.down * grid.across, each = (floats + 15) / 16 * 16;
  float* const memory = scratch_memory(regions * each);
  const auto cut = [](int64_t size, int64_t unit, int64_t parts, int64_t i) {
    return std::min(size, (size + unit - 1) / unit * i / parts * unit);
  };
  constexpr int64_t kWorthwhile = 1 << 30;
  parallel_rows(regions, kWorthwhile, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t down = i / grid.across, across = i % grid.across;
      const Region region{cut(m, rows, grid.down, down), cut(m, rows, grid.down, down + 1),
                          cut(n, cols, grid.across, across), cut(n, cols, grid.across, across + 1)};
      f(region, memory + i * each);
    }
  });
}

inline void run_many_rows(const LinearKernels& kernels, const Product& p) {
  parallel_regions(p.m, p.n, p.k, kernels.rows, kernels.cols, kernels.scratch(p),
                   [&](const Region& r, float* scratch) { kernels.product(p, r, scratch); });
}

// y [rows, out] = x [rows, in] w^T + bias for readable w, contiguous y and bias.
inline void run_product(const LinearKernels& kernels, const Operand& x, int64_t rows,
                        const Tensor& w, const std::optional<Tensor>& bias, void* y) {
  const int64_t in = w.size(1), out = w.size(0);
  if (rows <= kLinearFewRows) return run_few_rows(kernels, x.p, rows, w, bias, y);
  run_many_rows(kernels, {x, operand(w), data_or_null(bias), y, rows, out, in, out, false, false,
                          dtype_of(w)});
}

}  // namespace fastlm
