// feed_forward: the first products with the activation in them, and the pointwise part alone.
// Computes   hidden = act(x w_gate^T + b_gate) * (x w_in^T + b_in), or act(x w_in^T + b_in)
// Algorithm  a panel of both weights at a time against 64 rows of x (cpu/gemm.h); bias, activation
//            and product are applied to the sums while they are in L1. Backward recomputes the
//            activation beside its slope.
// Tile       panel of 48 weight rows x 64 rows of x; two panels of sums, 24 KiB on the stack
// Traffic    reads the weights once per block of rows, writes hidden (and the projections where
//            gradients follow); backward reads grad, up, gate and writes hidden and two gradients
// Numerics   fp32 sums and activation, one rounding; same bits for any number of threads
// Source     arXiv:2002.05202
#include "cpu/gemm.h"
#include "cpu/activation_math.h"

template <Activation kAct, class T>
void hidden_panels(const FeedForwardHidden& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  const T* b_in = static_cast<const T*>(a.b_in);
  const T* b_gate = static_cast<const T*>(a.b_gate);
  Sums up, gate;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel, rows_w = min_of<int64_t>(kPanel, a.out - first);
    const T* w_in = static_cast<const T*>(a.w_in) + first * a.ld_in;
    const T* w_gate = static_cast<const T*>(a.w_gate) + first * a.ld_gate;
    for (int64_t m = 0; m < a.rows; m += kBlockX) {
      const int64_t rows = min_of<int64_t>(kBlockX, a.rows - m);
      panel_product(x + m * a.in, rows, w_in, a.ld_in, rows_w, a.in, &up);
      if (a.w_gate) {
        panel_product(x + m * a.in, rows, w_gate, a.ld_gate, rows_w, a.in, &gate);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (m + r) * a.out + first;
        each_vector(rows_w, [&](int64_t i, auto... n) {
          const VecF u = biased(up.at + r * kPanel, b_in ? b_in + first : nullptr, i, n...);
          if (a.up) store(static_cast<T*>(a.up) + at + i, u, n...);
          VecF h;
          if (a.w_gate) {
            const VecF g = biased(gate.at + r * kPanel, b_gate ? b_gate + first : nullptr, i, n...);
            if (a.gate) store(static_cast<T*>(a.gate) + at + i, g, n...);
            h = activate<kAct>(g) * u;
          } else {
            h = activate<kAct>(u);
          }
          store(static_cast<T*>(a.hidden) + at + i, h, n...);
        });
      }
    }
  }
}

template <Activation kAct, class T>
void pointwise_range(const FeedForwardPointwise& a, int64_t begin, int64_t end) {
  const T* up = static_cast<const T*>(a.up) + begin;
  const T* gate = static_cast<const T*>(a.gate) + begin;
  T* grad = static_cast<T*>(a.grad) + begin;
  T* hidden = static_cast<T*>(a.hidden) + begin;
  T* grad_gate = static_cast<T*>(a.grad_gate) + begin;
  if (a.grad == nullptr) {
    each_vector(end - begin, [&](int64_t i, auto... n) {
      const VecF u = load(up + i, n...);
      const VecF h = a.gate ? activate<kAct>(load(gate + i, n...)) * u : activate<kAct>(u);
      store(hidden + i, h, n...);
    });
  } else if (a.gate == nullptr) {
    each_vector(end - begin, [&](int64_t i, auto... n) {
      VecF h;
      const VecF slope = activate_slope<kAct>(load(up + i, n...), &h);
      store(grad + i, load(grad + i, n...) * slope, n...);
      store(hidden + i, h, n...);
    });
  } else {
    each_vector(end - begin, [&](int64_t i, auto... n) {
      const VecF u = load(up + i, n...), d = load(grad + i, n...);
      VecF act;
      const VecF slope = activate_slope<kAct>(load(gate + i, n...), &act);
      store(grad_gate + i, d * u * slope, n...);
      store(grad + i, d * act, n...);
      store(hidden + i, act * u, n...);
    });
  }
}

// Calls f<activation, element type>(a, begin, end).
#define DISPATCH_ACTIVATION(f)                        \
  switch (a.act) {                                    \
    case Activation::kSilu:                           \
      return DISPATCH_TYPE(f, Activation::kSilu);     \
    case Activation::kGelu:                           \
      return DISPATCH_TYPE(f, Activation::kGelu);     \
    case Activation::kGeluTanh:                       \
      return DISPATCH_TYPE(f, Activation::kGeluTanh); \
    case Activation::kRelu:                           \
      return DISPATCH_TYPE(f, Activation::kRelu);     \
    case Activation::kRelu2:                          \
      return DISPATCH_TYPE(f, Activation::kRelu2);    \
  }
#define DISPATCH_TYPE(f, act) \
  with_type(a.dtype, [&]<class T>(const T*) { f<act, T>(a, begin, end); })

void hidden(const FeedForwardHidden& a, int64_t begin, int64_t end) {
  DISPATCH_ACTIVATION(hidden_panels)
}
void pointwise(const FeedForwardPointwise& a, int64_t begin,
               int64_t end){DISPATCH_ACTIVATION(pointwise_range)}

FASTLM_EXPORT(FeedForwardKernels, feed_forward) = {
  kPanel,
  hidden,
  pointwise
};
