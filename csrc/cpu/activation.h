// activation and gated activation, forward and backward.
// Computes   y = act(x), or y = act(x) * up; dx = g act'(x) (* up), dup = g act(x)
// Algorithm  one pass; the backward pass computes act and its slope together
// Tile       row [ v0 | v1 | ... | masked tail ]; a dense tensor is one long row
// Traffic    reads every input once, writes every output once
// Numerics   fp32, one rounding to the output; elements are independent of each other
// Source     arXiv:1606.08415 (gelu, silu), arXiv:2109.08668 (relu2), arXiv:2002.05202 (gated)
#include "cpu/activation_math.h"

// Calls f(offset, Both()) for each two whole vectors of [begin, end), f(offset) for one more and
// f(offset, lanes) once for the tail.
template <class F>
inline void for_lanes(int64_t begin, int64_t end, F&& f) {
  for (; begin + 2 * kLanes <= end; begin += 2 * kLanes) f(begin, Both());
  for (; begin + kLanes <= end; begin += kLanes) f(begin);
  if (begin < end) f(begin, static_cast<int>(end - begin));
}

template <class T, Activation kAct>
void forward_rows(const ActivationForward& a, int64_t row, int64_t row_end, int64_t begin,
                  int64_t end) {
  constexpr bool kFine = sizeof(T) == sizeof(float);
  for (; row < row_end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    if (a.up == nullptr) {
      for_lanes(begin, end, [&](int64_t i, auto... n) {
        store(y + i, activate<kAct, kFine>(load(x + i, n...)), n...);
      });
    } else {
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
      for_lanes(begin, end, [&](int64_t i, auto... n) {
        store(y + i, activate<kAct, kFine>(load(x + i, n...)) * load(up + i, n...), n...);
      });
    }
  }
}

template <class T, Activation kAct>
void backward_rows(const ActivationBackward& a, int64_t row, int64_t row_end, int64_t begin,
                   int64_t end) {
  for (; row < row_end; ++row) {
    const T* g = static_cast<const T*>(a.grad) + row * a.cols;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
    if (a.up == nullptr) {
      for_lanes(begin, end, [&](int64_t i, auto... n) {
        auto y = load(x + i, n...);
        store(dx + i, load(g + i, n...) * activate_slope<kAct>(y, &y), n...);
      });
    } else {
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
      T* dup = static_cast<T*>(a.dup) + row * a.dup_stride;
      for_lanes(begin, end, [&](int64_t i, auto... n) {
        auto y = load(x + i, n...);
        const auto gi = load(g + i, n...);
        const auto slope = activate_slope<kAct>(y, &y);
        const auto d = gi * slope * load(up + i, n...);
        store(dup + i, gi * y, n...);
        store(dx + i, d, n...);
      });
    }
  }
}

// Instantiates f<T, act> for the arguments' element type and activation.
#define DISPATCH_ACTIVATION(f, T, a, ...)                 \
  switch (a.act) {                                        \
    case Activation::kSilu:                               \
      return f<T, Activation::kSilu>(a, __VA_ARGS__);     \
    case Activation::kGelu:                               \
      return f<T, Activation::kGelu>(a, __VA_ARGS__);     \
    case Activation::kGeluTanh:                           \
      return f<T, Activation::kGeluTanh>(a, __VA_ARGS__); \
    case Activation::kRelu:                               \
      return f<T, Activation::kRelu>(a, __VA_ARGS__);     \
    case Activation::kRelu2:                              \
      return f<T, Activation::kRelu2>(a, __VA_ARGS__);    \
  }

void forward(const ActivationForward& a, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) {
    DISPATCH_ACTIVATION(forward_rows, T, a, row, row_end, begin, end)
  });
}

void backward(const ActivationBackward& a, int64_t row, int64_t row_end, int64_t begin,
              int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) {
    DISPATCH_ACTIVATION(backward_rows, T, a, row, row_end, begin, end)
  });
}

FASTLM_EXPORT(ActivationKernels, activation) = {forward, backward};
