// cross_entropy forward and backward.
// Computes   lse[r] = log sum_c e^z[r,c], the loss of csrc/ops/cross_entropy.h, and its gradient
//            grad[r,c] = scale (p (w[t] (1 - e + 2 z_loss lse) + e/V sum w) - e/V w[c])
//                        - scale w[t] (1 - e) at c = t, with p = e^(z[r,c] - lse[r])
// Algorithm  forward: blocks of a row, each its maximum, then its sum of exponentials from L1, the
//            running sum rescaled when the maximum grows; backward: one pass
// Tile       row [ block of 4096 | ... | masked tail ], one row at a time, four accumulators
// Traffic    forward reads the logits once; backward reads them once and writes the gradient, past
//            the caches when it is larger than they are
// Numerics   fp32 throughout, one rounding to the gradient; fixed order, same bits for any threads
// Source     Milakov and Gimelshein, arXiv:1805.02867 (online softmax)

constexpr int64_t kBlock = 4096;
// Gradients beyond this many bytes are streamed: they would push everything else out of the cache.
constexpr int64_t kStreamBytes = 24 << 20;

// e^(z - largest) for logits of type T.
inline VecF falling(const float*, VecF x) { return vexp_falling<6>(x); }
inline VecF falling(const bf16*, VecF x) { return vexp_falling<5>(x); }

// Folds f over a row in four independent accumulators: f(acc, vector, offset).
template <class T, class F>
inline void fold4(const T* x, int64_t n, VecF (&acc)[4], float filler, F&& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) acc[k] = f(acc[k], load(x + i + k * kLanes), i + k * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) acc[0] = f(acc[0], load(x + i), i);
  if (i < n) {
    const VecF tail = load(x + i, static_cast<int>(n - i));
    acc[1] = f(acc[1], select(below(i, n), tail, set1(filler)), i);
  }
}

// The largest logit of a row and sum_c e^(z[c] - largest). Kept apart, not as one lse: adding the
// two would round away what a large maximum leaves of the loss.
struct Softmax {
  float top, sum;
};

template <class T>
inline Softmax softmax_of(const T* x, int64_t classes) {
  Softmax s{-INFINITY, 0.0f};
  for (int64_t b = 0; b < classes; b += kBlock) {
    const int64_t n = min_of(kBlock, classes - b);
    VecF acc[4];
    for (VecF& a : acc) a = set1(-INFINITY);
    fold4(x + b, n, acc, -INFINITY, [](VecF a, VecF v, int64_t) { return vmax(a, v); });
    const float high = reduce_max(vmax(vmax(acc[0], acc[1]), vmax(acc[2], acc[3])));
    if (high > s.top) {
      s.sum *= expf(s.top - high);
      s.top = high;
    }
    // where all was masked out so far, NaN must still reach the sum
    const VecF shift = set1(s.top == -INFINITY ? 0.0f : s.top);
    for (VecF& a : acc) a = zero();
    fold4(x + b, n, acc, -INFINITY,
          [&](VecF a, VecF v, int64_t) { return a + falling(x, v - shift); });
    s.sum += reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return s;
}

// sum_c w[c] (top - z[c]), w ones where null.
template <class T>
inline float weighted_drop(const T* x, const float* w, int64_t classes, float top) {
  VecF acc[4] = {zero(), zero(), zero(), zero()};
  const VecF t = set1(top);
  if (w == nullptr) {
    fold4(x, classes, acc, top, [&](VecF a, VecF v, int64_t) { return a + (t - v); });
  } else {
    fold4(x, classes, acc, top, [&](VecF a, VecF v, int64_t i) {
      const int64_t n = classes - i;
      return fma(t - v, n < kLanes ? load(w + i, static_cast<int>(n)) : load(w + i), a);
    });
  }
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T>
void forward_rows(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = a.target[r];
    if (t == a.ignore_index) {
      a.loss[r] = a.softmax[2 * r] = a.softmax[2 * r + 1] = 0.0f;
      continue;
    }
    const T* x = static_cast<const T*>(a.logits) + r * a.classes;
    const Softmax s = softmax_of(x, a.classes);
    const float w = a.class_weight == nullptr ? 1.0f : a.class_weight[t];
    const float log_sum = logf(s.sum), lse = s.top + log_sum;
    float loss = (1.0f - a.smoothing) * ((s.top - to_float(x[t])) + log_sum);
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    loss *= w;
    if (a.smoothing != 0.0f) {
      const float drop = weighted_drop(x, a.class_weight, a.classes, s.top);
      loss += a.smoothing / static_cast<float>(a.classes) * (drop + a.class_weight_sum * log_sum);
    }
    a.loss[r] = loss;
    a.softmax[2 * r] = s.top;
    a.softmax[2 * r + 1] = s.sum;
  }
}

template <bool kStream, class T>
inline void put(T* p, VecF v) {
  if constexpr (kStream) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

template <class T, bool kStream>
void backward_rows(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.logits) + r * a.classes;
    T* g = static_cast<T*>(a.grad) + r * a.classes;
    const int64_t t = a.target[r];
    const bool kept = t != a.ignore_index;
    if (!kept || a.scale[r] == 0.0f) {
      memset(g, 0, sizeof(T) * static_cast<size_t>(a.classes));
      continue;
    }
    const float w = a.class_weight == nullptr ? 1.0f : a.class_weight[t];
    const float spread = a.smoothing / static_cast<float>(a.classes);
    const float top = a.softmax[2 * r], sum = a.softmax[2 * r + 1];
    const float lse = top + logf(sum), keep = w * (1.0f - a.smoothing);
    const float slope =
        a.scale[r] * (keep + 2.0f * a.z_loss * w * lse + spread * a.class_weight_sum);
    const VecF shift = set1(top), factor = set1(slope / sum), even = set1(a.scale[r] * spread);
    int64_t i = 0;
    if (a.smoothing == 0.0f) {
      for (; i + 2 * kLanes <= a.classes; i += 2 * kLanes) {
        put<kStream>(g + i, falling(x, load(x + i) - shift) * factor);
        put<kStream>(g + i + kLanes, falling(x, load(x + i + kLanes) - shift) * factor);
      }
    }
    for (; i < a.classes; i += kLanes) {
      const int n = static_cast<int>(min_of<int64_t>(kLanes, a.classes - i));
      VecF v = falling(x, load(x + i, n) - shift) * factor;
      const VecF weight = a.class_weight == nullptr ? set1(1.0f) : load(a.class_weight + i, n);
      store(g + i, v - even * weight, n);
    }
    // the target's own class, in fp32 with one rounding
    const float p = expf(to_float(x[t]) - top) / sum;
    from_float(slope * p - a.scale[r] * (spread * w + keep), g + t);
  }
}

void forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return forward_rows<float>(a, begin, end);
  if (a.dtype == DType::kBFloat16) return forward_rows<bf16>(a, begin, end);
}

template <class T>
void backward_as(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  const int64_t row_bytes = a.classes * static_cast<int64_t>(sizeof(T));
  const bool aligned = row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(a.grad) % 64 == 0;
  if (aligned && a.rows * row_bytes > kStreamBytes) return backward_rows<T, true>(a, begin, end);
  return backward_rows<T, false>(a, begin, end);
}

void backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) return backward_as<float>(a, begin, end);
  if (a.dtype == DType::kBFloat16) return backward_as<bf16>(a, begin, end);
}

FASTLM_EXPORT(CrossEntropyKernels, cross_entropy) = {forward, backward};
