// decode_attention forward: a few queries against a long cache.
// Computes   out[b,h,i] = softmax(scale q[b,h,i] . K[b,g]^T + alibi) V[b,g] over the keys seen
// Algorithm  each task takes up to 512 keys of one key-value head, with all queries of that head
//            packed as rows: all scores, then maximum, exponentials and sum, then the weighted
//            sum of V. Pieces of one sequence are joined afterwards by their maxima.
// Tile       rows x keys: 1 x 16, 2 x 8, 3 x 4 or 4 x 4 sums of whole vectors along the head,
//            turned into one vector of scores at once; V in rows x 4 or 8 vectors
// Traffic    reads K and V once for all queries of the group, writes out
// Numerics   fp32 scores and sums; for bf16 the weights are rounded to bf16 before they meet V.
//            The cut depends on lengths and head count only: same bits for any thread count
// Source     arXiv:2205.14135; Dao et al., Flash-Decoding for long-context inference, 2023
constexpr int kRows = 16;  // rows that share one pass over the keys
constexpr int64_t kSumStride = kDecodeMaxHead + 16;
constexpr int kAhead = 8192;      // bytes; K from memory comes in about a tenth faster
constexpr int64_t kKeysHot = 64;  // keys whose V is met by all rows before the next

// One vector of elements: kLanes floats, or 2 kLanes bf16 values that count as pairs.
template <class T>
constexpr int64_t kStep = sizeof(T) == 4 ? kLanes : 2 * kLanes;
inline VecF load_step(const float* p) { return load(p); }
inline VecF load_step(const float* p, int n) { return load(p, n); }
inline VecH load_step(const bf16* p) { return load_pairs(p); }
inline VecH load_step(const bf16* p, int n) { return load_pairs(p, n); }
inline VecF multiply_add(VecF acc, VecF a, VecF b) { return fma(a, b, acc); }
inline VecF multiply_add(VecF acc, VecH a, VecH b) { return dot2(acc, a, b); }

// Calls f(offset) for each whole step of `size` elements and f(offset, n) once for its tail.
template <int64_t kSize, class F>
inline void for_steps(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + kSize <= size; i += kSize) f(i);
  if (i < size) f(i, static_cast<int>(size - i));
}

template <class T>
struct DecodeScratch {
  alignas(64) T queries[kRows * kDecodeMaxHead];
  alignas(64) float scores[kRows * kDecodeMaxPiece];  // scores, then weights
  alignas(64) bf16 weights[kRows * kDecodeMaxPiece];  // the weights in bf16
  alignas(64) float sums[kRows * kSumStride];  // of the values, then maximum and sum of weights
};

// Scores of R rows against kLanes keys from key on; keys beyond `last` repeat it.
template <int R, class T>
inline void score_keys(const T* q, const T* keys, int64_t stride, int64_t key, int64_t last,
                       int64_t head, float* scores) {
  constexpr int kKeys = kLanes / (R == 3 ? 4 : R);
  for (int part = 0; part < kLanes; part += kKeys) {
    const T* k[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = keys + min_of(key + part + j, last) * stride;
    VecF acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    for_steps<kStep<T>>(head, [&](int64_t d, auto... n) {
      decltype(load_step(q)) row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) row[r] = load_step(q + r * kDecodeMaxHead + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        __builtin_prefetch(reinterpret_cast<const char*>(k[j] + d) + kAhead);
        const auto x = load_step(k[j] + d, n...);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r * kKeys + j] = multiply_add(acc[r * kKeys + j], row[r], x);
        }
      }
    });
    alignas(64) float sums[kLanes];
    store(sums, reduce_lanes(acc));
    for (int r = 0; r < R; ++r) {
      memcpy(scores + r * kDecodeMaxPiece + part, sums + r * kKeys, sizeof(float) * kKeys);
    }
  }
}

// Scale, bias and visibility of one row's scores for the keys [begin, begin + count), then weights
// e^(s - maximum) in place, zero for keys not seen and up to the next whole vector.
inline void weigh_keys(const DecodeAttentionArgs& a, int64_t b, int64_t row, int64_t kv_head,
                       int64_t begin, int64_t count, float* s, float& maximum, float& total) {
  const int64_t position = a.lengths[b] - a.queries + row % a.queries;
  const int64_t first = a.window > 0 ? position - a.window + 1 - begin : 0;
  const int64_t own = position - begin, last = min_of(own, count - 1);  // sees first ... last
  const VecF scale = set1(a.scale), hidden = set1(-INFINITY);
  float slope = 0.0f;
  if (a.slopes != nullptr) {
    slope = a.slopes[b * a.slopes_batch + kv_head * (a.heads / a.kv_heads) + row / a.queries];
  }
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  VecF top = hidden;
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF x = load(s + j) * scale;
    if (slope != 0.0f) {
      x = fma(set1(slope), set1(static_cast<float>(j - own)) + load(lane), x);
    }
    if (j < first || j + kLanes > last + 1) {
      x = select(below(j, first), hidden, select(below(j, last + 1), x, hidden));
    }
    store(s + j, x);
    top = vmax(top, x);
  }
  maximum = reduce_max(top);
  VecF sum = zero();
  const VecF shift = set1(maximum == -INFINITY ? 0.0f : maximum);
  for (int64_t j = 0; j < count; j += kLanes) {
    const VecF e = vexp(load(s + j) - shift);
    store(s + j, e);
    sum = sum + e;
  }
  total = reduce_add(sum);
}

// sums += weights x values for R rows, `count` keys and C steps of the value, or its tail of n.
template <int R, int C, class... N>
inline void add_values(const float* w, const float* v, int64_t stride, int64_t count, float* sums,
                       N... n) {
  VecF acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(sums + r * kSumStride + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j, v += stride) {
    VecF x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) x[c] = load(v + c * kLanes, n...);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VecF weight = set1(w[r * kDecodeMaxPiece + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, x[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(sums + r * kSumStride + c * kLanes, acc[r][c]);
  }
}

// For bf16 two keys at a time; `count` is even or the next row is not read.
template <int R, int C, class... N>
inline void add_values(const bf16* w, const bf16* v, int64_t stride, int64_t count, float* sums,
                       N... n) {
  VecF acc[R][2 * C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 2 * C; ++c) acc[r][c] = load(sums + r * kSumStride + c * kLanes);
  }
  alignas(64) bf16 nothing[C * 2 * kLanes] = {};
  for (int64_t j = 0; j < count; j += 2, v += 2 * stride) {
    const bf16* next = j + 1 < count ? v + stride : nothing;
    VecH lo[C], hi[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      zip(load_pairs(v + c * 2 * kLanes, n...), load_pairs(next + c * 2 * kLanes, n...), lo[c],
          hi[c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VecH weight = broadcast_pair(w + r * kDecodeMaxPiece + j);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        acc[r][2 * c] = dot2(acc[r][2 * c], lo[c], weight);
        acc[r][2 * c + 1] = dot2(acc[r][2 * c + 1], hi[c], weight);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 2 * C; ++c) store(sums + r * kSumStride + c * kLanes, acc[r][c]);
  }
}

// All of the value from `done` on, in ever narrower strips of C steps.
template <int R, int C, class T>
inline void add_strips(const T* w, const T* v, int64_t stride, int64_t count, int64_t size,
                       int64_t done, float* sums) {
  for (; done + C * kStep<T> <= size; done += C * kStep<T>) {
    add_values<R, C>(w, v + done, stride, count, sums + done);
  }
  if constexpr (C > 1) {
    if (done < size) add_strips<R, C / 2>(w, v, stride, count, size, done, sums);
  } else if (done < size) {
    add_values<R, 1>(w, v + done, stride, count, sums + done, static_cast<int>(size - done));
  }
}

// Calls f(Count<R>, row) for groups of at most 4 rows.
template <int R>
struct Count {
  static constexpr int value = R;
};
template <class F>
inline void for_row_groups(int rows, F&& f) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) f(Count<4>(), r);
  if (rows - r == 3) f(Count<3>(), r);
  if (rows - r == 2) f(Count<2>(), r);
  if (rows - r == 1) f(Count<1>(), r);
}

// Vectors of sums that R rows keep in registers, of 16 or 32 (AVX-512).
template <int R>
constexpr int kSumVectors = kLanes == 16 ? (R <= 2 ? 8 : 4)
                                         : (R == 1   ? 8
                                            : R == 2 ? 4
                                                     : 2);

// Rows [row, row + rows) of one task: fills scratch.sums.
template <class T>
inline void attend_rows(const DecodeAttentionArgs& a, int64_t b, int64_t kv_head, int64_t row,
                        int rows, int64_t begin, int64_t count, DecodeScratch<T>& scratch) {
  const int64_t group = a.heads / a.kv_heads;
  const size_t row_bytes = sizeof(T) * static_cast<size_t>(a.head_dim);
  const int64_t padded = (a.head_dim + kStep<T> - 1) / kStep<T> * kStep<T>;
  for (int r = 0; r < rows; ++r) {
    const int64_t head = kv_head * group + (row + r) / a.queries, i = (row + r) % a.queries;
    T* q = scratch.queries + r * kDecodeMaxHead;
    memset(q, 0, sizeof(T) * static_cast<size_t>(padded));
    memcpy(q, static_cast<const T*>(a.q) + b * a.q_batch + head * a.q_head + i * a.q_row,
           row_bytes);
    memset(scratch.sums + r * kSumStride, 0, sizeof(float) * kSumStride);
  }
  const T* keys = static_cast<const T*>(a.k) + b * a.k_batch + kv_head * a.k_head + begin * a.k_row;
  for (int64_t j = 0; j < count; j += kLanes) {
    for_row_groups(rows, [&](auto group_rows, int r) {
      score_keys<group_rows.value>(scratch.queries + r * kDecodeMaxHead, keys, a.k_row, j,
                                   count - 1, a.head_dim, scratch.scores + r * kDecodeMaxPiece + j);
    });
  }
  float maximum[kRows], total[kRows];
  for (int r = 0; r < rows; ++r) {
    float* s = scratch.scores + r * kDecodeMaxPiece;
    weigh_keys(a, b, row + r, kv_head, begin, count, s, maximum[r], total[r]);
    if constexpr (sizeof(T) == 2) {
      for (int64_t j = 0; j < count; j += kLanes) {
        store(scratch.weights + r * kDecodeMaxPiece + j, load(s + j));
      }
    }
  }
  const T* weights;
  if constexpr (sizeof(T) == 2) {
    weights = scratch.weights;
  } else {
    weights = scratch.scores;
  }
  const T* values =
      static_cast<const T*>(a.v) + b * a.v_batch + kv_head * a.v_head + begin * a.v_row;
  for (int64_t j = 0; j < count; j += kKeysHot) {
    for_row_groups(rows, [&](auto group_rows, int r) {
      constexpr int R = group_rows.value;
      add_strips<R, kSumVectors<R> * kLanes / kStep<T>>(
          weights + r * kDecodeMaxPiece + j, values + j * a.v_row, a.v_row,
          min_of(kKeysHot, count - j), a.value_dim, 0, scratch.sums + r * kSumStride);
    });
  }
  for (int r = 0; r < rows; ++r) {
    float* sums = scratch.sums + r * kSumStride;
    if constexpr (sizeof(T) == 2) {
      for (int64_t d = 0; d < a.value_dim; d += 2 * kLanes) {
        VecF lo = load(sums + d), hi = load(sums + d + kLanes);
        unzip(lo, hi);
        store(sums + d, lo);
        store(sums + d + kLanes, hi);
      }
    }
    sums[a.value_dim] = maximum[r];
    sums[a.value_dim + 1] = total[r];
  }
}

// Joins the pieces of one row, `stride` floats apart, and writes the result.
template <class T>
inline void finish_row(const DecodeAttentionArgs& a, int64_t b, int64_t head, int64_t i,
                       float* piece, int64_t pieces, int64_t stride) {
  const int64_t size = a.value_dim;
  float maximum = a.sinks == nullptr ? -INFINITY : a.sinks[head];
  for (int64_t p = 0; p < pieces; ++p) maximum = max_of(maximum, piece[p * stride + size]);
  float total = a.sinks == nullptr ? 0.0f : expf(a.sinks[head] - maximum);
  for (int64_t p = 0; p < pieces; ++p) {
    float& factor = piece[p * stride + size];
    factor = factor == -INFINITY ? 0.0f : expf(factor - maximum);
    total += factor * piece[p * stride + size + 1];
  }
  const VecF divisor = set1(total == 0.0f ? 1.0f : total);
  T* out = static_cast<T*>(a.out) + b * a.out_batch + head * a.out_head + i * a.out_row;
  for_steps<kLanes>(size, [&](int64_t d, auto... n) {
    VecF sum = zero();
    for (int64_t p = 0; p < pieces; ++p) {
      sum = fma(set1(piece[p * stride + size]), load(piece + p * stride + d, n...), sum);
    }
    store(out + d, sum / divisor, n...);
  });
}

inline int64_t pieces_of(const DecodeAttentionArgs& a, int64_t b) {
  return (a.first_task[b + 1] - a.first_task[b]) / a.kv_heads;
}

template <class T>
void attend_tasks(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  DecodeScratch<T> scratch;
  const int64_t group = a.heads / a.kv_heads, rows = group * a.queries;
  int64_t b = 0;
  for (int64_t task = begin; task < end; ++task) {
    while (task >= a.first_task[b + 1]) ++b;
    const int64_t pieces = pieces_of(a, b), local = task - a.first_task[b];
    const int64_t kv_head = local / pieces, piece = local % pieces;
    const int64_t keys = a.lengths[b] - a.first_key[b];
    const int64_t size = ((keys + pieces - 1) / pieces + 15) / 16 * 16;
    const int64_t start = min_of(keys, piece * size), count = min_of(size, keys - start);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int some = static_cast<int>(min_of<int64_t>(kRows, rows - row));
      attend_rows(a, b, kv_head, row, some, a.first_key[b] + start, count, scratch);
      for (int r = 0; r < some; ++r) {
        float* sums = scratch.sums + r * kSumStride;
        if (pieces > 1) {
          memcpy(a.partial + (task * rows + row + r) * (a.value_dim + 2), sums,
                 sizeof(float) * static_cast<size_t>(a.value_dim + 2));
        } else {
          const int64_t head = kv_head * group + (row + r) / a.queries;
          finish_row<T>(a, b, head, (row + r) % a.queries, sums, 1, 0);
        }
      }
    }
  }
}

template <class T>
void combine_rows(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t group = a.heads / a.kv_heads, rows = group * a.queries;
  const int64_t stride = a.value_dim + 2;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t i = index % a.queries, head = index / a.queries % a.heads;
    const int64_t b = index / a.queries / a.heads, pieces = pieces_of(a, b);
    if (pieces == 1) continue;  // finished by its task
    const int64_t task = a.first_task[b] + head / group * pieces;
    const int64_t row = head % group * a.queries + i;
    finish_row<T>(a, b, head, i, a.partial + (task * rows + row) * stride, pieces, rows * stride);
  }
}

void attend(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  a.dtype == DType::kFloat32 ? attend_tasks<float>(a, begin, end)
                             : attend_tasks<bf16>(a, begin, end);
}
void combine(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  a.dtype == DType::kFloat32 ? combine_rows<float>(a, begin, end)
                             : combine_rows<bf16>(a, begin, end);
}

FASTLM_EXPORT(DecodeAttentionKernels, decode_attention) = {attend, combine};
