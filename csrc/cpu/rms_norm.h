// rms_norm forward and backward.
// Computes   y[r,:] = s[r,:] * rsqrt(mean(s[r,:]^2) + eps) * (w + offset), s = x (+ residual)
// Algorithm  forward: pass 1 sums squares (and writes the sum), pass 2 scales from L1;
//            backward: pass 1 recomputes the statistic beside sum(g w s), pass 2 writes dx and
//            adds to the block's partial dw
// Tile       row [ v0 | v1 | ... | masked tail ], one row at a time, two accumulators
// Traffic    forward reads x (and residual) once, writes y (and the sum); backward reads g and s,
//            writes dx; the second pass of each hits the cache
// Numerics   fp32 throughout, one rounding to the output; fixed order, same bits for any threads
// Source     arXiv:1910.07467, equation 4
#include "cpu/norm_rows.h"

// The weight of the lanes at i (+ offset), whatever its type; ones where there is none.
template <class W>
struct Scale {
  const W* weight;
  VecF offset;
  VecF operator()(int64_t i) const { return load(weight + i) + offset; }
  VecF operator()(int64_t i, int n) const { return load(weight + i, n) + offset; }
};
template <>
struct Scale<void> {
  const void* weight;
  VecF offset;
  VecF operator()(int64_t) const { return set1(1.0f); }
  VecF operator()(int64_t, int) const { return set1(1.0f); }
};

inline float rstd_of(VecF squares, int64_t cols, float eps) {
  return 1.0f / sqrtf(reduce_add(squares) / static_cast<float>(cols) + eps);
}

template <class T>
inline VecF sum_squares(const T* x, int64_t cols) {
  VecF a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= cols; i += 2 * kLanes) {
    const VecF u = load(x + i), v = load(x + i + kLanes);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  for (; i + kLanes <= cols; i += kLanes) {
    const VecF u = load(x + i);
    a = fma(u, u, a);
  }
  if (i < cols) {
    const VecF u = load(x + i, static_cast<int>(cols - i));
    b = fma(u, u, b);
  }
  return a + b;
}

// sum = x + residual, rounded as stored: the norm of what the next layer will see.
template <class T>
inline void add_rows(const T* x, const T* residual, T* sum, int64_t cols) {
  for_vectors(cols, [&](int64_t i, auto... n) {
    store(sum + i, load(x + i, n...) + load(residual + i, n...), n...);
  });
}

template <class T, class W>
void forward_rows(const RmsNormForward& a, int64_t begin, int64_t end) {
  const Scale<W> scale{static_cast<const W*>(a.weight), set1(a.offset)};
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.cols;
    T* y = static_cast<T*>(a.y) + r * a.cols;
    if (a.residual != nullptr) {
      T* sum = static_cast<T*>(a.summed) + r * a.cols;
      add_rows(x, static_cast<const T*>(a.residual) + r * a.cols, sum, a.cols);
      x = sum;
    }
    const VecF rstd = set1(rstd_of(sum_squares(x, a.cols), a.cols, a.eps));
    for_vectors(a.cols, [&](int64_t i, auto... n) {
      store(y + i, load(x + i, n...) * rstd * scale(i, n...), n...);
    });
  }
}

template <class T, class W>
void backward_rows(const RmsNormBackward& a, int64_t begin, int64_t end) {
  const Scale<W> scale{static_cast<const W*>(a.weight), set1(a.offset)};
  for (int64_t block = begin; block < end; ++block) {
    float* dw = a.dweight_blocks == nullptr ? nullptr : a.dweight_blocks + block * a.cols;
    if (dw != nullptr) memset(dw, 0, sizeof(float) * static_cast<size_t>(a.cols));
    const int64_t last = block_start(block + 1, a.rows, a.blocks);
    for (int64_t r = block_start(block, a.rows, a.blocks); r < last; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.cols;
      const T* g = static_cast<const T*>(a.grad) + r * a.cols;
      T* dx = static_cast<T*>(a.dx) + r * a.cols;
      const T* extra = static_cast<const T*>(a.grad_summed);
      if (extra != nullptr) extra += r * a.cols;

      VecF squares = zero(), dots = zero();
      for_vectors(a.cols, [&](int64_t i, auto... n) {
        const VecF s = load(x + i, n...);
        squares = fma(s, s, squares);
        dots = fma(load(g + i, n...) * scale(i, n...), s, dots);
      });
      const float rstd = rstd_of(squares, a.cols, a.eps);
      const VecF slope = set1(rstd * rstd * reduce_add(dots) / static_cast<float>(a.cols));
      const VecF rs = set1(rstd);
      for_vectors(a.cols, [&](int64_t i, auto... n) {
        const VecF s = load(x + i, n...), gi = load(g + i, n...);
        VecF d = rs * (gi * scale(i, n...) - s * slope);
        if (extra != nullptr) d = d + load(extra + i, n...);
        store(dx + i, d, n...);
        if (dw != nullptr) store(dw + i, fma(gi * rs, s, load(dw + i, n...)), n...);
      });
    }
  }
}

// Instantiates f<T, W> for the argument's element types; the weight is fp32 or like x.
#define DISPATCH_NORM(f, a, ...)                                                    \
  switch (a.dtype) {                                                                \
    case DType::kFloat32:                                                           \
      return a.weight ? f<float, float>(__VA_ARGS__) : f<float, void>(__VA_ARGS__); \
    case DType::kBFloat16:                                                          \
      if (a.weight == nullptr) return f<bf16, void>(__VA_ARGS__);                   \
      return a.weight_dtype == DType::kFloat32 ? f<bf16, float>(__VA_ARGS__)        \
                                               : f<bf16, bf16>(__VA_ARGS__);        \
    default:                                                                        \
      return;                                                                       \
  }

void forward(const RmsNormForward& a, int64_t begin, int64_t end) {
  DISPATCH_NORM(forward_rows, a, a, begin, end)
}
void backward(const RmsNormBackward& a, int64_t begin,
              int64_t end){DISPATCH_NORM(backward_rows, a, a, begin, end)}

FASTLM_EXPORT(RmsNormKernels, rms_norm) = {
  forward,
  backward
};
