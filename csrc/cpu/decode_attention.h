// decode_attention forward: a few queries against a long cache.
// Computes   out[b,h,i] = softmax(scale q[b,h,i] . K[b,g]^T + alibi) V[b,g] over the keys seen
// Algorithm  each task takes up to 512 keys of one key-value head, with all queries of that head
//            packed as rows: all scores, then maximum, exponentials and sum, then the weighted
//            sum of V. Pieces of one sequence are joined afterwards by their maxima. Where the
//            keys of a paged cache lie is looked up once a task.
// Tile       rows x keys: 1 x 16, 2 x 8, 3 x 4 or 4 x 4 sums of whole vectors along the head,
//            turned into one vector of scores at once; V in rows x 4 or 8 vectors
// Traffic    reads K and V once for all queries of the group, writes out
// Numerics   fp32 scores and sums; for bf16 the weights are rounded to bf16 before they meet V,
//            fp16 and int8 are widened to fp32; int8 scales multiply scores and weights.
//            The cut depends on lengths and head count only: same bits for any thread count
// Source     arXiv:2205.14135; Dao et al., Flash-Decoding for long-context inference, 2023
constexpr int kRows = 16;  // rows that share one pass over the keys
constexpr int64_t kSumStride = kDecodeMaxHead + 16;
constexpr int kAhead = 8192;      // bytes; K from memory comes in about a tenth faster
constexpr int64_t kKeysHot = 64;  // keys whose V is met by all rows before the next

// How elements C of the cache are computed with: one vector of kStep elements of the cache and of
// queries Query. bf16 counts as pairs, the rest as fp32.
template <class C>
struct Cache {
  using Query = float;
};
template <>
struct Cache<bf16> {
  using Query = bf16;
};
template <class C>
using Query = typename Cache<C>::Query;
template <class C>
constexpr int64_t kStep = sizeof(Query<C>) == 4 ? kLanes : 2 * kLanes;
template <class C, class... N>
inline VecF load_step(const C* p, N... n) {
  return load(p, n...);
}
template <class... N>
inline VecH load_step(const bf16* p, N... n) {
  return load_pairs(p, n...);
}
inline VecF multiply_add(VecF acc, VecF a, VecF b) { return fma(a, b, acc); }
inline VecF multiply_add(VecF acc, VecH a, VecH b) { return dot2(acc, a, b); }

// Calls f(offset) for each whole step of `size` elements and f(offset, n) once for its tail.
template <int64_t kSize, class F>
inline void for_steps(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + kSize <= size; i += kSize) f(i);
  if (i < size) f(i, static_cast<int>(size - i));
}

// Where the keys or values of a task lie: a stride apart, or listed.
template <class C>
struct Straight {
  const C* first;
  int64_t stride;
  const C* at(int64_t j) const { return first + j * stride; }
};
template <class C>
struct Listed {
  const C* const* rows;
  const C* at(int64_t j) const { return rows[j]; }
};

template <class C>
struct DecodeScratch {
  static constexpr bool kScaled = sizeof(C) == 1;
  alignas(64) Query<C> queries[kRows * kDecodeMaxHead];
  alignas(64) float scores[kRows * kDecodeMaxPiece];  // scores, then weights
  alignas(64) bf16 weights[kRows * kDecodeMaxPiece];  // the weights in bf16
  alignas(64) float sums[kRows * kSumStride];  // of the values, then maximum and sum of weights
  const C *keys[kDecodeMaxPiece], *values[kDecodeMaxPiece];  // where the piece's tokens lie
  alignas(64) float key_scales[kScaled ? kDecodeMaxPiece : 1];
  alignas(64) float value_scales[kScaled ? kDecodeMaxPiece : 1];
};

inline float scale_at(const Scales& s, int64_t page, int64_t head, int64_t row) {
  const int64_t i = page * s.batch + head * s.head + row * s.row;
  return s.dtype == DType::kFloat32 ? static_cast<const float*>(s.data)[i]
                                    : to_float(static_cast<const fp16*>(s.data)[i]);
}

// Lists the keys [begin, begin + count) of a head up.
template <class C>
inline void find_keys(const DecodeAttentionArgs& a, int64_t b, int64_t kv_head, int64_t begin,
                      int64_t count, DecodeScratch<C>& scratch) {
  const C* k = static_cast<const C*>(a.k) + kv_head * a.k_head;
  const C* v = static_cast<const C*>(a.v) + kv_head * a.v_head;
  for (int64_t j = 0; j < count;) {  // page by page
    int64_t page = b, row = begin + j, n = count;
    if (a.page_size > 0) {
      page = a.table[b * a.table_row + row / a.page_size];
      row %= a.page_size;
      n = min_of(count - j, a.page_size - row);
    }
    const C* first_k = k + page * a.k_batch + row * a.k_row;
    const C* first_v = v + page * a.v_batch + row * a.v_row;
    for (int64_t i = 0; i < n; ++i) {
      scratch.keys[j + i] = first_k + i * a.k_row;
      scratch.values[j + i] = first_v + i * a.v_row;
    }
    if constexpr (DecodeScratch<C>::kScaled) {
      for (int64_t i = 0; i < n; ++i) {
        scratch.key_scales[j + i] = scale_at(a.k_scale, page, kv_head, row + i);
        scratch.value_scales[j + i] = scale_at(a.v_scale, page, kv_head, row + i);
      }
    }
    j += n;
  }
  if constexpr (DecodeScratch<C>::kScaled) {
    for (int64_t j = count; j < (count + kLanes - 1) / kLanes * kLanes; ++j) {
      scratch.key_scales[j] = scratch.value_scales[j] = 0.0f;
    }
  }
}

// Scores of R rows against kLanes keys from key on; keys beyond `last` repeat it.
template <int R, class C, template <class> class Rows>
inline void score_keys(const Query<C>* q, Rows<C> keys, int64_t key, int64_t last, int64_t head,
                       float* scores) {
  constexpr int kKeys = kLanes / (R == 3 ? 4 : R);
  for (int part = 0; part < kLanes; part += kKeys) {
    const C* k[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = keys.at(min_of(key + part + j, last));
    VecF acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    for_steps<kStep<C>>(head, [&](int64_t d, auto... n) {
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

// Adds the mask to the scores of one row for the keys [begin, begin + count).
inline void mask_keys(const DecodeMask& m, int64_t b, int64_t head, int64_t query, int64_t begin,
                      int64_t count, float* s) {
  const int64_t first = b * m.batch + head * m.head + query * m.row + begin * m.key;
  if (m.added) {
    const float* p = static_cast<const float*>(m.data) + first;
    for (int64_t j = 0; j < count; ++j) s[j] += p[j * m.key];
  } else {
    const uint8_t* p = static_cast<const uint8_t*>(m.data) + first;
    for (int64_t j = 0; j < count; ++j) s[j] = p[j * m.key] != 0 ? s[j] : -INFINITY;
  }
}

// Scale, bias and visibility of one row's scores for the keys [begin, begin + count), then weights
// e^(s - maximum) in place, zero for keys not seen and up to the next whole vector.
inline void weigh_keys(const DecodeAttentionArgs& a, int64_t b, int64_t row, int64_t kv_head,
                       int64_t begin, int64_t count, const float* key_scales, float* s,
                       float& maximum, float& total) {
  const int64_t head = kv_head * (a.heads / a.kv_heads) + row / a.queries;
  const int64_t position = a.lengths[b] - a.queries + row % a.queries;
  const int64_t first = a.window > 0 ? position - a.window + 1 - begin : 0;
  const int64_t own = position - begin, last = min_of(own, count - 1);  // sees first ... last
  const VecF hidden = set1(-INFINITY);
  const float slope = a.slopes == nullptr ? 0.0f : a.slopes[b * a.slopes_batch + head];
  if (key_scales != nullptr) {
    for (int64_t j = 0; j < count; j += kLanes) store(s + j, load(s + j) * load(key_scales + j));
  }
  if (a.softcap != 0.0f) {
    const VecF cap = set1(a.softcap), inside = set1(a.scale / a.softcap);
    for (int64_t j = 0; j < count; j += kLanes) store(s + j, cap * vtanh(load(s + j) * inside));
  }
  const VecF unit = set1(a.softcap == 0.0f ? a.scale : 1.0f);
  alignas(64) float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  VecF top = hidden;
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF x = load(s + j) * unit;
    if (slope != 0.0f) {
      x = fma(set1(slope), set1(static_cast<float>(j - own)) + load(lane), x);
    }
    if (j < first || j + kLanes > last + 1) {
      x = select(below(j, first), hidden, select(below(j, last + 1), x, hidden));
    }
    store(s + j, x);
    top = vmax(top, x);
  }
  if (a.mask.data != nullptr) {
    mask_keys(a.mask, b, head, row % a.queries, begin, count, s);
    top = hidden;
    for (int64_t j = 0; j < count; j += kLanes) top = vmax(top, load(s + j));
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
template <int R, int C, class Rows, class... N>
inline void add_values(const float* w, Rows values, int64_t from, int64_t offset, int64_t count,
                       float* sums, N... n) {
  VecF acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(sums + r * kSumStride + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const auto* v = values.at(from + j) + offset;
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
template <int R, int C, class Rows, class... N>
inline void add_values(const bf16* w, Rows values, int64_t from, int64_t offset, int64_t count,
                       float* sums, N... n) {
  VecF acc[R][2 * C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 2 * C; ++c) acc[r][c] = load(sums + r * kSumStride + c * kLanes);
  }
  alignas(64) bf16 nothing[C * 2 * kLanes] = {};
  for (int64_t j = 0; j < count; j += 2) {
    const bf16* v = values.at(from + j) + offset;
    const bf16* next = j + 1 < count ? values.at(from + j + 1) + offset : nothing;
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
template <int R, int C, class W, class V, template <class> class Rows>
inline void add_strips(const W* w, Rows<V> values, int64_t from, int64_t count, int64_t size,
                       int64_t done, float* sums) {
  for (; done + C * kStep<V> <= size; done += C * kStep<V>) {
    add_values<R, C>(w, values, from, done, count, sums + done);
  }
  if constexpr (C > 1) {
    if (done < size) add_strips<R, C / 2>(w, values, from, count, size, done, sums);
  } else if (done < size) {
    add_values<R, 1>(w, values, from, done, count, sums + done, static_cast<int>(size - done));
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

// A row of queries as the cache is computed with, zero up to a whole step.
template <class T>
inline void take_query(const T* q, int64_t size, float* to) {
  for_steps<kLanes>(size, [&](int64_t d, auto... n) { store(to + d, load(q + d, n...)); });
}
inline void take_query(const bf16* q, int64_t size, bf16* to) {
  memset(to, 0, sizeof(bf16) * static_cast<size_t>((size + kStep<bf16> - 1) & -kStep<bf16>));
  memcpy(to, q, sizeof(bf16) * static_cast<size_t>(size));
}

// Rows [row, row + rows) of one task: fills scratch.sums.
template <class T, class C, template <class> class Rows>
inline void attend_rows(const DecodeAttentionArgs& a, int64_t b, int64_t kv_head, int64_t row,
                        int rows, int64_t begin, int64_t count, Rows<C> keys, Rows<C> values,
                        DecodeScratch<C>& scratch) {
  constexpr bool kPairs = sizeof(Query<C>) == 2, kScaled = DecodeScratch<C>::kScaled;
  const int64_t group = a.heads / a.kv_heads;
  for (int r = 0; r < rows; ++r) {
    const int64_t head = kv_head * group + (row + r) / a.queries, i = (row + r) % a.queries;
    take_query(static_cast<const T*>(a.q) + b * a.q_batch + head * a.q_head + i * a.q_row,
               a.head_dim, scratch.queries + r * kDecodeMaxHead);
    memset(scratch.sums + r * kSumStride, 0, sizeof(float) * kSumStride);
  }
  for (int64_t j = 0; j < count; j += kLanes) {
    for_row_groups(rows, [&](auto group_rows, int r) {
      score_keys<group_rows.value>(scratch.queries + r * kDecodeMaxHead, keys, j, count - 1,
                                   a.head_dim, scratch.scores + r * kDecodeMaxPiece + j);
    });
  }
  float maximum[kRows], total[kRows];
  for (int r = 0; r < rows; ++r) {
    float* s = scratch.scores + r * kDecodeMaxPiece;
    weigh_keys(a, b, row + r, kv_head, begin, count, kScaled ? scratch.key_scales : nullptr, s,
               maximum[r], total[r]);
    for (int64_t j = 0; j < count && (kPairs || kScaled); j += kLanes) {
      if constexpr (kPairs) {
        store(scratch.weights + r * kDecodeMaxPiece + j, load(s + j));
      } else {
        store(s + j, load(s + j) * load(scratch.value_scales + j));
      }
    }
  }
  const Query<C>* weights;
  if constexpr (kPairs) {
    weights = scratch.weights;
  } else {
    weights = scratch.scores;
  }
  for (int64_t j = 0; j < count; j += kKeysHot) {
    for_row_groups(rows, [&](auto group_rows, int r) {
      constexpr int R = group_rows.value;
      add_strips<R, kSumVectors<R> * kLanes / kStep<C>>(weights + r * kDecodeMaxPiece + j, values,
                                                        j, min_of(kKeysHot, count - j), a.value_dim,
                                                        0, scratch.sums + r * kSumStride);
    });
  }
  for (int r = 0; r < rows; ++r) {
    float* sums = scratch.sums + r * kSumStride;
    for (int64_t d = 0; kPairs && d < a.value_dim; d += 2 * kLanes) {
      VecF lo = load(sums + d), hi = load(sums + d + kLanes);
      unzip(lo, hi);
      store(sums + d, lo);
      store(sums + d + kLanes, hi);
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

template <class T, class C>
void attend_tasks(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  DecodeScratch<C> scratch;
  const int64_t group = a.heads / a.kv_heads, rows = group * a.queries;
  int64_t b = 0;
  for (int64_t task = begin; task < end; ++task) {
    while (task >= a.first_task[b + 1]) ++b;
    const int64_t pieces = pieces_of(a, b), local = task - a.first_task[b];
    const int64_t kv_head = local / pieces, piece = local % pieces;
    const int64_t keys = a.lengths[b] - a.first_key[b];
    const int64_t size = ((keys + pieces - 1) / pieces + 15) / 16 * 16;
    const int64_t start = min_of(keys, piece * size), count = min_of(size, keys - start);
    const int64_t first = a.first_key[b] + start;
    const bool listed = sizeof(C) == 1 || a.page_size > 0;
    if (listed) find_keys(a, b, kv_head, first, count, scratch);
    const C* k = static_cast<const C*>(a.k) + b * a.k_batch + kv_head * a.k_head + first * a.k_row;
    const C* v = static_cast<const C*>(a.v) + b * a.v_batch + kv_head * a.v_head + first * a.v_row;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int some = static_cast<int>(min_of<int64_t>(kRows, rows - row));
      if (listed) {
        attend_rows<T>(a, b, kv_head, row, some, first, count, Listed<C>{scratch.keys},
                       Listed<C>{scratch.values}, scratch);
      } else if constexpr (sizeof(C) > 1) {
        attend_rows<T>(a, b, kv_head, row, some, first, count, Straight<C>{k, a.k_row},
                       Straight<C>{v, a.v_row}, scratch);
      }
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
  const bool bytes = a.k_scale.data != nullptr;
  with_type(a.dtype, [&]<class T>(const T*) {
    return bytes ? attend_tasks<T, int8_t>(a, begin, end) : attend_tasks<T, T>(a, begin, end);
  });
}
void combine(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>(const T*) { combine_rows<T>(a, begin, end); });
}

FASTLM_EXPORT(DecodeAttentionKernels, decode_attention) = {attend, combine};
