// feed_forward: the first products with the activation in them, and the pointwise part alone.
// Computes   hidden = act(x w_gate^T + b_gate) * (x w_in^T + b_in), or act(x w_in^T + b_in)
// Algorithm  a few rows: a panel of both weights at a time (cpu/gemm.h); many: packed tiles whose
//            left half is the projection and whose right half its gate (cpu/packed_product.h).
//            Bias, activation and product are applied to the sums while they are in L1. Backward
//            recomputes the activation beside its slope.
// Tile       panel of 48 weight rows x 16 rows of x, two panels of sums, 24 KiB on the stack; 14
//            rows x 16 outputs packed
// Traffic    reads the weights once, writes hidden (and the projections where gradients follow);
//            backward reads grad, up, gate and writes hidden and two gradients
// Numerics   fp32 sums and activation, one rounding; same bits for any number of threads
// Source     arXiv:2002.05202
#include "cpu/gemm.h"
#include "cpu/packed_product.h"
#include "cpu/activation_math.h"

// From the sums of a vector of outputs to what is stored of them.
template <Activation kAct, class T>
struct Finish {
  const FeedForwardHidden& a;

  template <class... N>
  void operator()(int64_t row, int64_t column, VecF up, VecF gate, N... n) const {
    const int64_t at = row * a.out + column;
    if (a.b_in) up = up + load(static_cast<const T*>(a.b_in) + column, n...);
    if (a.up) store(static_cast<T*>(a.up) + at, up, n...);
    VecF h;
    if (a.w_gate.p) {
      if (a.b_gate) gate = gate + load(static_cast<const T*>(a.b_gate) + column, n...);
      if (a.gate) store(static_cast<T*>(a.gate) + at, gate, n...);
      h = activate<kAct>(gate) * up;
    } else {
      h = activate<kAct>(up);
    }
    store(static_cast<T*>(a.hidden) + at, h, n...);
  }
};

// ---- a few rows: the weights as they lie ----

template <Activation kAct, class T>
void hidden_panels(const FeedForwardHidden& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x.p);
  const Finish<kAct, T> finish{a};
  Sums up, gate;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel, outs = min_of<int64_t>(kPanel, a.out - first);
    const T* w_in = static_cast<const T*>(a.w_in.p) + first * a.w_in.along;
    panel_product(x, a.rows, w_in, a.w_in.along, outs, a.in, &up);
    if (a.w_gate.p) {
      const T* w_gate = static_cast<const T*>(a.w_gate.p) + first * a.w_gate.along;
      panel_product(x, a.rows, w_gate, a.w_gate.along, outs, a.in, &gate);
    }
    for (int64_t r = 0; r < a.rows; ++r) {
      each_vector(outs, [&](int64_t i, auto... n) {
        const int64_t at = r * kPanel + i;
        finish(r, first + i, load(up.at + at, n...), a.w_gate.p ? load(gate.at + at, n...) : zero(),
               n...);
      });
    }
  }
}

// ---- many rows: packed ----

// A gated tile has a vector of `up` on the left and the same outputs of `gate` on the right.
// Unfinished sums wait in `kept`.
template <Activation kAct, class T>
struct ToHidden {
  const FeedForwardHidden& a;
  const Region& r;
  float* kept;

  void fetch(const packed::Place& at) const {
    if (!at.first || !at.last) {
      packed::fetch_rows(packed::waiting(kept, r, at, 0), at.rows, packed::kCols);
    }
  }
  void operator()(const packed::Place& at, float* sums) const {
    const Finish<kAct, T> finish{a};
    for (int64_t i = 0; i < at.rows; ++i, sums += packed::kCols) {
      if (!at.first || !at.last) {
        float* wait = packed::waiting(kept, r, at, i);
        for (int64_t j = 0; j < packed::kCols; j += kLanes) {
          VecF v = load(sums + j);
          if (!at.first) v = v + load(wait + j);
          store(at.last ? sums + j : wait + j, v);
        }
        if (!at.last) continue;
      }
      if (a.w_gate.p) {
        each_vector(min_of<int64_t>(kLanes, a.out - at.n / 2), [&](int64_t j, auto... n) {
          finish(at.m + i, at.n / 2 + j, load(sums + j), load(sums + kLanes + j), n...);
        });
      } else {
        each_vector(at.cols, [&](int64_t j, auto... n) {
          finish(at.m + i, at.n + j, load(sums + j), zero(), n...);
        });
      }
    }
  }
};

template <class T>
bool keeps_sums(const FeedForwardHidden& a) {
  return packed::depth_of<packed::Engine<T>>(a.in) < a.in;
}

int64_t scratch(const FeedForwardHidden& a) {
  return with_type(a.dtype, [&]<class T>(const T*) {
    return packed::scratch_floats<packed::Engine<T>>(a.in, keeps_sums<T>(a));
  });
}

template <Activation kAct, class T>
void hidden_product(const FeedForwardHidden& a, const Region& r, float* memory) {
  using E = packed::Engine<T>;
  float* const kept = memory + packed::scratch_floats<E>(a.in, false);
  packed::in_height<E>(r, keeps_sums<T>(a), [&](const Region& part) {
    const ToHidden<kAct, T> sink{a, part, kept};
    if (a.w_gate.p == nullptr) {
      return packed::product<E, T>(a.x, a.in, part, memory, packed::columns_of<E, T>(a.w_in), sink);
    }
    const auto both = [&](int64_t k0, int64_t depth, int64_t n, int64_t width, float* to) {
      const int64_t steps = packed::steps_of<E>(depth);
      for (int64_t first = n / 2; first < (n + width) / 2; first += kLanes) {
        const int64_t outs = min_of<int64_t>(kLanes, a.out - first);
        const packed::Piece up{first, outs, kLanes, to, packed::kCols};
        const packed::Piece gate{first, outs, kLanes, to + kLanes, packed::kCols};
        packed::pack<E, T>(a.w_in, k0, depth, &up, 1);
        packed::pack<E, T>(a.w_gate, k0, depth, &gate, 1);
        to += steps * packed::kCols;
      }
    };
    packed::product<E, T>(a.x, a.in, part, memory, both, sink);
  });
}

// ---- the pointwise part alone ----

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

// Calls f<activation, element type>(a, ...).
#define DISPATCH_ACTIVATION(f, ...)                                \
  switch (a.act) {                                                 \
    case Activation::kSilu:                                        \
      return DISPATCH_TYPE(f, Activation::kSilu, __VA_ARGS__);     \
    case Activation::kGelu:                                        \
      return DISPATCH_TYPE(f, Activation::kGelu, __VA_ARGS__);     \
    case Activation::kGeluTanh:                                    \
      return DISPATCH_TYPE(f, Activation::kGeluTanh, __VA_ARGS__); \
    case Activation::kRelu:                                        \
      return DISPATCH_TYPE(f, Activation::kRelu, __VA_ARGS__);     \
    case Activation::kRelu2:                                       \
      return DISPATCH_TYPE(f, Activation::kRelu2, __VA_ARGS__);    \
  }
#define DISPATCH_TYPE(f, act, ...) \
  with_type(a.dtype, [&]<class T>(const T*) { f<act, T>(a, __VA_ARGS__); })

void hidden(const FeedForwardHidden& a, int64_t begin, int64_t end) {
  DISPATCH_ACTIVATION(hidden_panels, begin, end)
}
void hidden_region(const FeedForwardHidden& a, const Region& r, float* memory) {
  DISPATCH_ACTIVATION(hidden_product, r, memory)
}
void pointwise(const FeedForwardPointwise& a, int64_t begin,
               int64_t end){DISPATCH_ACTIVATION(pointwise_range, begin, end)}

FASTLM_EXPORT(FeedForwardKernels, feed_forward) = {
  kPanel,
  hidden,
  packed::Engine<bf16>::kRows,
  packed::kCols,
  scratch,
  hidden_region,
  pointwise
};
