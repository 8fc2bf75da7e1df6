// cross_entropy and its gradient.
// Computes   lse[r] = log sum_c e^z[r,c], the loss of csrc/ops/cross_entropy.h, and its gradient
//            grad[r,c] = scale (p (w[t] (1 - e + 2 z_loss lse) + e/V sum w) - e/V w[c])
//                        - scale w[t] (1 - e) at c = t, with p = e^(z[r,c] - lse[r]);
//            with a soft-cap times dz/dlogits = 1 - tanh^2
// Algorithm  one visit to a row: block by block its maximum, then its exponentials from L1, which
//            are kept in scratch memory in L2 where a gradient is wanted; the running sum is
//            rescaled when the maximum grows; the gradient is then a product, not a second
//            exponential
// Tile       row [ block of 4096 | ... | masked tail ], one row at a time, four accumulators
// Traffic    reads the logits once and writes the gradient once, past the caches when it is larger
//            than they are; may overwrite the logits
// Numerics   fp32 throughout, one rounding to the gradient; fixed order, same bits for any threads
// Source     Milakov and Gimelshein, arXiv:1805.02867 (online softmax)

constexpr int64_t kBlock = 4096;

// e^(z - largest) for logits of type T.
inline VecF falling(const float*, VecF x) { return vexp_falling<6>(x); }
template <class Half>
inline VecF falling(const Half*, VecF x) {
  return vexp_falling<5>(x);
}

// What becomes of a logit before the softmax: nothing, or z = cap tanh(x / cap).
struct Plain {
  explicit Plain(float) {}
  VecF operator()(VecF x) const { return x; }
};
struct Capped {
  float cap;
  explicit Capped(float softcap) : cap(softcap) {}
  VecF operator()(VecF x) const { return set1(cap) * vtanh(x / set1(cap)); }
  VecF slope(VecF x) const {  // dz/dlogit
    VecF slope;
    vtanh(x / set1(cap), &slope);
    return slope;
  }
};
inline float first_lane(VecF x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  return lanes[0];
}
template <class Bound>
inline float bounded(const Bound& bound, float x) {
  return first_lane(bound(set1(x)));
}

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

// f(offset) for each whole vector of n values and f(offset, lanes) for the rest.
template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The largest logit of a row and sum_c e^(z[c] - largest). Kept apart, not as one lse: adding the
// two would round away what a large maximum leaves of the loss.
struct Softmax {
  float top, sum;
};

// With kKeep, kept[c] = e^(z[c] - shift[c / kBlock]); the tail is padded to a vector.
template <bool kKeep, class T, class Bound>
inline Softmax softmax_of(const T* x, int64_t classes, const Bound& bound, float* kept,
                          float* shift) {
  Softmax s{-INFINITY, 0.0f};
  for (int64_t b = 0; b < classes; b += kBlock) {
    const int64_t n = min_of(kBlock, classes - b);
    VecF acc[4];
    for (VecF& a : acc) a = set1(-INFINITY);
    fold4(x + b, n, acc, -INFINITY, [](VecF a, VecF v, int64_t) { return vmax(a, v); });
    // the bound grows with its argument, so it may follow the maximum
    const float high = bounded(bound, reduce_max(vmax(vmax(acc[0], acc[1]), vmax(acc[2], acc[3]))));
    if (high > s.top) {
      s.sum *= expf(s.top - high);
      s.top = high;
    }
    if constexpr (kKeep) shift[b / kBlock] = s.top;
    // where all was masked out so far, NaN must still reach the sum
    const VecF from = set1(s.top == -INFINITY ? 0.0f : s.top);
    for (VecF& a : acc) a = zero();
    fold4(x + b, n, acc, -INFINITY, [&](VecF a, VecF v, int64_t i) {
      __builtin_prefetch(x + b + kBlock + i, 0, 2);  // or what follows the row: the next one
      VecF e = falling(x, bound(v) - from);
      if constexpr (!__is_same(Bound, Plain)) e = select(below(b + i, classes), e, zero());
      if constexpr (kKeep) store(kept + b + i, e);
      return a + e;
    });
    s.sum += reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return s;
}

// sum_c w[c] (top - z[c]), w ones where null.
template <class T, class Bound>
inline float weighted_drop(const T* x, const float* w, int64_t classes, const Bound& bound,
                           float top) {
  VecF acc[4] = {zero(), zero(), zero(), zero()};
  const VecF t = set1(top);
  fold4(x, classes, acc, 0.0f, [&](VecF a, VecF v, int64_t i) {
    const bool whole = i + kLanes <= classes;
    const VecF drop = whole ? t - bound(v) : select(below(i, classes), t - bound(v), zero());
    if (w == nullptr) return a + drop;
    return fma(drop, whole ? load(w + i) : load(w + i, static_cast<int>(classes - i)), a);
  });
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <bool kStream, class T, class... N>
inline void put(T* p, VecF v, N... n) {
  if constexpr (kStream && sizeof...(n) == 0) {
    stream(p, v);
  } else {
    store(p, v, n...);
  }
}

// What a row's gradient is made of: grad[c] = slope p[c] - even w[c], less `keep` at the target.
struct Slopes {
  float slope, even, keep;
};

template <bool kStream, class T, class Bound>
inline void write_gradient(const CrossEntropy& a, const T* x, T* g, int64_t t, const Bound& bound,
                           const Softmax& s, const Slopes& f, const float* kept,
                           const float* shift) {
  const float z = bounded(bound, to_float(x[t]));
  float own = f.slope * (expf(z - s.top) / s.sum) - f.keep;
  own -= f.even * (a.class_weight == nullptr ? 1.0f : a.class_weight[t]);
  if constexpr (!__is_same(Bound, Plain)) own *= first_lane(bound.slope(set1(to_float(x[t]))));
  const VecF even = set1(f.even);
  for (int64_t b = 0; b < a.classes; b += kBlock) {
    const int64_t n = min_of(kBlock, a.classes - b);
    const float* e = kept + b;
    const float* w = a.class_weight == nullptr ? nullptr : a.class_weight + b;
    const VecF factor = set1(f.slope / s.sum * expf(shift[b / kBlock] - s.top));
    if constexpr (__is_same(Bound, Plain)) {
      if (f.even == 0.0f) {
        each(n, [&](int64_t i, auto... some) {
          put<kStream>(g + b + i, load(e + i) * factor, some...);
        });
        continue;
      }
    }
    each(n, [&](int64_t i, auto... some) {
      VecF v = load(e + i) * factor - (w == nullptr ? even : even * load(w + i, some...));
      if constexpr (!__is_same(Bound, Plain)) {
        v = v * bound.slope(load(x + b + i, some...));
      }
      put<kStream>(g + b + i, v, some...);
    });
  }
  if constexpr (kStream) stream_end();
  from_float(own, g + t);  // the target's own class, in fp32 with one rounding
}

template <class T, class Bound>
void rows_of(const CrossEntropy& a, float* scratch, int64_t begin, int64_t end) {
  const Bound bound(a.softcap);
  float* kept = scratch;
  float* shift = scratch + (a.classes + kLanes);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = a.target[r];
    const T* x = static_cast<const T*>(a.logits) + r * a.classes;
    T* g = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + r * a.classes;
    const float scale = a.factor * (a.scale == nullptr ? 1.0f : a.scale[r]);
    if (t == a.ignore_index) {
      a.loss[r] = 0.0f;
      if (g != nullptr) memset(g, 0, sizeof(T) * static_cast<size_t>(a.classes));
      continue;
    }
    const bool slopes = g != nullptr && scale != 0.0f;
    const Softmax s = slopes ? softmax_of<true>(x, a.classes, bound, kept, shift)
                             : softmax_of<false>(x, a.classes, bound, kept, shift);
    const float w = a.class_weight == nullptr ? 1.0f : a.class_weight[t];
    const float log_sum = logf(s.sum), lse = s.top + log_sum;
    float loss = (1.0f - a.smoothing) * ((s.top - bounded(bound, to_float(x[t]))) + log_sum);
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    loss *= w;
    const float spread = a.smoothing / static_cast<float>(a.classes);
    if (a.smoothing != 0.0f) {
      const float drop = weighted_drop(x, a.class_weight, a.classes, bound, s.top);
      loss += spread * (drop + a.class_weight_sum * log_sum);
    }
    a.loss[r] = loss;
    if (slopes) {
      const float keep = w * (1.0f - a.smoothing);
      const float slope = keep + 2.0f * a.z_loss * w * lse + spread * a.class_weight_sum;
      const Slopes f{scale * slope, scale * spread, scale * keep};
      if (a.stream) {
        write_gradient<true>(a, x, g, t, bound, s, f, kept, shift);
      } else {
        write_gradient<false>(a, x, g, t, bound, s, f, kept, shift);
      }
    } else if (g != nullptr) {
      memset(g, 0, sizeof(T) * static_cast<size_t>(a.classes));  // only now: g may be x
    }
  }
}

template <class T>
void rows_as(const CrossEntropy& a, float* scratch, int64_t begin, int64_t end) {
  if (a.softcap > 0.0f) return rows_of<T, Capped>(a, scratch, begin, end);
  rows_of<T, Plain>(a, scratch, begin, end);
}

void rows(const CrossEntropy& a, float* scratch, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) { rows_as<T>(a, scratch, begin, end); });
}

FASTLM_EXPORT(CrossEntropyKernels, cross_entropy) = {rows};
