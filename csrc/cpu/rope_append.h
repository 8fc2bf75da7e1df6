// rope_append: one decoding step's rotation and its write to the cache.
// Computes   out = turn(norm(q), p), k_cache[p] = turn(norm(k), p), v_cache[p] = v
// Algorithm  a token's angles are widened to fp32 once for all its heads; a head with a norm is
//            normalised into a buffer in L1 and turned from there
// Tile       one token: its heads of q, k and v one after the other
// Traffic    reads q, k, v and a row of each table once; writes q and the cache's rows
// Numerics   fp32, one rounding to the output; sums of squares in a fixed order
// Source     arXiv:2104.09864, equation 34; arXiv:1910.07467, equation 4
#include "cpu/rope_rows.h"

struct Angles {
  alignas(64) float cos[kRopeAppendMaxHead], sin[kRopeAppendMaxHead];
};

template <class T>
inline void widen(const T* x, float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, auto... lanes) { store(y + i, load(x + i, lanes...), lanes...); });
}

// The angles of position p as the rotation reads them: for halves as they lie in the tables, for
// neighbours laid out.
template <class Tab>
inline void read_angles(const RopeAppendArgs& a, int64_t p, Angles& out) {
  const Tab* cos = static_cast<const Tab*>(a.cos) + p * a.cos_row;
  const Tab* sin = static_cast<const Tab*>(a.sin) + p * a.sin_row;
  if (a.interleaved) {
    lay_out(cos, sin, out.cos, out.sin, a.rotary, a.full_width, false);
  } else {
    widen(cos, out.cos, a.full_width ? a.rotary : a.rotary / 2);
    widen(sin, out.sin, a.full_width ? a.rotary : a.rotary / 2);
  }
}

template <class X, class Y>
inline void turn(const RopeAppendArgs& a, const X* x, Y* y, const Angles& angles) {
  if (a.rotary != 0 && a.interleaved) {
    rotate_neighbours(x, y, angles.cos, angles.sin, a.rotary);
  } else if (a.rotary != 0) {
    const int64_t half = a.rotary / 2;
    rotate_halves(x, y, angles.cos, angles.sin, half, a.full_width ? half : 0, false);
  }
  const X* from = x + a.rotary;
  Y* to = y + a.rotary;
  for_vectors(a.head_dim - a.rotary,
              [&](int64_t i, auto... n) { store(to + i, load(from + i, n...), n...); });
}

// `weight`: head_dim factors with the offset added, or null.
template <class T>
inline void prepare(const RopeAppendArgs& a, const T* x, T* y, const float* weight,
                    const Angles& angles) {
  if (weight == nullptr) {
    turn(a, x, y, angles);
    return;
  }
  alignas(64) float row[kRopeAppendMaxHead];
  double squares;
  row_sums<1>(a.head_dim, &squares, [&](VecF* s, int64_t i, auto... n) {
    const VecF v = load(x + i, n...);
    s[0] = fma(v, v, s[0]);
  });
  const double mean = squares / static_cast<double>(a.head_dim);
  const VecF rstd = set1(static_cast<float>(1.0 / sqrt(mean + static_cast<double>(a.eps))));
  for_vectors(a.head_dim, [&](int64_t i, auto... n) {
    store(row + i, load(x + i, n...) * rstd * load(weight + i, n...), n...);
  });
  turn(a, row, y, angles);
}

// The factors of a norm; null where there is none.
inline const float* factors(const RopeAppendArgs& a, const void* weight, float* out) {
  if (weight == nullptr) return nullptr;
  if (a.weight_dtype == DType::kFloat32) {
    widen(static_cast<const float*>(weight), out, a.head_dim);
  } else if (a.weight_dtype == DType::kBFloat16) {
    widen(static_cast<const bf16*>(weight), out, a.head_dim);
  } else {
    widen(static_cast<const fp16*>(weight), out, a.head_dim);
  }
  const VecF offset = set1(a.offset);
  for_vectors(a.head_dim,
              [&](int64_t i, auto... n) { store(out + i, load(out + i, n...) + offset, n...); });
  return out;
}

inline int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

template <class T>
void append_tokens(const RopeAppendArgs& a, int64_t begin, int64_t end) {
  alignas(64) float q_factors[kRopeAppendMaxHead], k_factors[kRopeAppendMaxHead];
  const float* q_weight = factors(a, a.q_weight, q_factors);
  const float* k_weight = factors(a, a.k_weight, k_factors);
  Angles angles;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / a.tokens, t = at % a.tokens;
    const int64_t length = a.lengths == nullptr ? a.length : index_at(a.lengths, a.wide_lengths, b);
    const int64_t p = length - a.tokens + t;
    int64_t row = b, place = p;  // the binding has looked at lengths and pages
    if (a.table != nullptr) {
      row = index_at(a.table, a.wide_table, b * a.table_row + p / a.page_size);
      place = p % a.page_size;
    }
    if (a.rotary != 0 && a.table_dtype == DType::kFloat32) {
      read_angles<float>(a, p, angles);
    } else if (a.rotary != 0) {
      read_angles<T>(a, p, angles);
    }
    const T* q = static_cast<const T*>(a.q) + b * a.q_batch + t * a.q_token;
    T* out = static_cast<T*>(a.out) + b * a.out_batch + t * a.out_token;
    for (int64_t h = 0; h < a.heads; ++h) {
      prepare(a, q + h * a.q_head, out + h * a.out_head, q_weight, angles);
    }
    const T* k = static_cast<const T*>(a.k) + b * a.k_batch + t * a.k_token;
    const T* v = static_cast<const T*>(a.v) + b * a.v_batch + t * a.v_token;
    T* keys = static_cast<T*>(a.k_cache) + row * a.k_cache_row + place * a.k_cache_token;
    T* values = static_cast<T*>(a.v_cache) + row * a.v_cache_row + place * a.v_cache_token;
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      prepare(a, k + h * a.k_head, keys + h * a.k_cache_head, k_weight, angles);
      memcpy(values + h * a.v_cache_head, v + h * a.v_head,
             sizeof(T) * static_cast<size_t>(a.value_dim));
    }
  }
}

void append(const RopeAppendArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kFloat32) {
    append_tokens<float>(a, begin, end);
  } else if (a.dtype == DType::kBFloat16) {
    append_tokens<bf16>(a, begin, end);
  } else {
    append_tokens<fp16>(a, begin, end);
  }
}

FASTLM_EXPORT(RopeAppendKernels, rope_append) = {append};
