// What both directions of attention are made of: engines, register tiles, packing, score rows.
// Included by attention.h, inside the set's namespace.
//
// All operands of the products are 32-bit words. With the engine Singles a word is one fp32 value;
// with Pairs it is two neighbouring bf16 values along the summed dimension, and one multiply-add
// sums both. The same tiles, packings and loops serve both; only `mac` differs. Squares are Pairs
// in tile registers: larger groups of rows, whole steps of 16 words, and products not scaled yet.
#include "cpu/squares.h"

constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;  // 6 x 4 of 32 registers, 6 x 2 of 16

struct Vectors {
  struct Registers {};                      // what a thread holds while it computes
  static constexpr int kGroup = kTileRows;  // rows of a product at a time
  static constexpr int64_t kUnit = 1;       // words of a step
};
struct Singles : Vectors {
  static constexpr int kPer = 1;     // values per word
  static constexpr int kDegree = 6;  // of the exponential
  // steps of a partial sum of scores and of gradients; without fused multiply-adds steps lose more
  static constexpr int64_t kChain = kLanes == 4 ? 16 : 64, kSumChain = kLanes == 4 ? 16 : 32;
  static VecF mac(VecF acc, VecF a, VecF b) { return fma(a, b, acc); }
};
struct Pairs : Vectors {
  static constexpr int kPer = 2;
  static constexpr int kDegree = 5;
  static constexpr int64_t kChain = 64, kSumChain = 64;
  static VecF mac(VecF acc, VecF a, VecF b) { return dot2(acc, as_pairs(a), as_pairs(b)); }
};
#if defined(__AMX_BF16__)
struct Squares : Pairs {
  using Registers = SquareRegisters;
  static constexpr int kGroup = 32;
  static constexpr int64_t kUnit = kSquareWords;
};
using PairedEngine = Squares;
#else
using PairedEngine = Pairs;
#endif
template <class T, bool kPaired>
struct EngineOf {
  using Type = Singles;
};
template <>
struct EngineOf<bf16, true> {
  using Type = PairedEngine;
};
template <class T>
using Engine = typename EngineOf<T, kFastPairs>::Type;

constexpr int64_t kBlock = kAttentionBlock;

inline int64_t words_of(int64_t values, int per) { return (values + per - 1) / per; }
// Words of a sum of so many values, in whole steps.
template <class E>
inline int64_t steps_of(int64_t values) {
  return (words_of(values, E::kPer) + E::kUnit - 1) / E::kUnit * E::kUnit;
}
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline int vectors_of(int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes); }

// ---- register tiles: c[rows, vectors] = scale * a b, or c += scale * a b ----

struct Left {  // word (i, k) at p[i * row + k * step]
  const float* p;
  int64_t row, step;
};
struct Right {  // words of step k from p + k * row on
  const float* p;
  int64_t row;
};
struct Target {
  float* p;
  int64_t row;
};

// A small tile sums in several chains, which hides the latency of the multiply-adds and rounds
// less.
template <class E, int kRows, int kVectors>
void tile(Left a, Right b, Target c, int64_t steps, bool add, VecF scale) {
  constexpr int kRoom = kTileRows * kTileVectors / (kRows * kVectors);
  constexpr int kChains = kRoom >= 4 ? 4 : kRoom >= 2 ? 2 : 1;
  VecF acc[kChains][kRows][kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kChains; ++n) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[n][i][j] = zero();
    }
  }
  const auto step = [&](int64_t k, VecF(&sums)[kRows][kVectors]) {
    VecF right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load(b.p + k * b.row + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const VecF left = set1(a.p[i * a.row + k * a.step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = E::mac(sums[i][j], left, right[j]);
    }
  };
  int64_t k = 0;
  for (; k + kChains <= steps; k += kChains) {
#pragma GCC unroll 4
    for (int n = 0; n < kChains; ++n) step(k + n, acc[n]);
  }
  for (; k < steps; ++k) step(k, acc[0]);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      VecF sum = acc[0][i][j];
      if constexpr (kChains == 2) sum = sum + acc[1][i][j];
      if constexpr (kChains == 4) sum = (sum + acc[1][i][j]) + (acc[2][i][j] + acc[3][i][j]);
      float* p = c.p + i * c.row + j * kLanes;
      store(p, add ? fma(sum, scale, load(p)) : sum * scale);
    }
  }
}

using TileFunction = void (*)(Left, Right, Target, int64_t, bool, VecF);
template <class E>
struct Tiles {
  static constexpr TileFunction kOf[4][kTileRows] = {
      {tile<E, 1, 1>, tile<E, 2, 1>, tile<E, 3, 1>, tile<E, 4, 1>, tile<E, 5, 1>, tile<E, 6, 1>},
      {tile<E, 1, 2>, tile<E, 2, 2>, tile<E, 3, 2>, tile<E, 4, 2>, tile<E, 5, 2>, tile<E, 6, 2>},
#if defined(__AVX512F__)
      {tile<E, 1, 3>, tile<E, 2, 3>, tile<E, 3, 3>, tile<E, 4, 3>, tile<E, 5, 3>, tile<E, 6, 3>},
      {tile<E, 1, 4>, tile<E, 2, 4>, tile<E, 3, 4>, tile<E, 4, 4>, tile<E, 5, 4>, tile<E, 6, 4>},
#endif
  };
};

#if defined(__AMX_BF16__)
// Up to 32 rows of c, all columns. Rows of c up to 16 or 32 are written; the words up to a whole
// step must be zero on one side and finite on the other.
inline void square_group(int rows, int vectors, int64_t steps, Left a, Right b, Target c,
                         bool add) {
  const auto with = [&]<bool kTall, bool kBroad>(int j) {
    square_product<kTall, kBroad>(a.p, a.row, kSquareWords, b.p + j * kLanes, b.row,
                                  (steps + kSquareWords - 1) / kSquareWords, c.p + j * kLanes,
                                  c.row, add);
  };
  for (int j = 0; j < vectors; j += 2) {
    const bool broad = vectors - j > 1;
    if (rows > 16) {
      broad ? with.template operator()<true, true>(j) : with.template operator()<true, false>(j);
    } else {
      broad ? with.template operator()<false, true>(j) : with.template operator()<false, false>(j);
    }
  }
}
#endif

// Up to E::kGroup rows of c, all columns. Long sums are made of partial sums of kChain steps: a
// shorter chain of roundings halves the error, and every block of 64 keys or queries is one.
template <class E, int64_t kChain = E::kChain>
inline void row_group(int rows, int vectors, int64_t steps, Left a, Right b, Target c, bool add,
                      float scale) {
#if defined(__AMX_BF16__)
  if constexpr (E::kUnit > 1) return square_group(rows, vectors, steps, a, b, c, add);
#endif
  for (int j = 0; j < vectors; j += kTileVectors) {
    const TileFunction run = Tiles<E>::kOf[min_of(kTileVectors, vectors - j) - 1][rows - 1];
    const Target to{c.p + j * kLanes, c.row};
    int64_t k = 0;
    do {
      run({a.p + k * a.step, a.row, a.step}, {b.p + k * b.row + j * kLanes, b.row}, to,
          min_of(kChain, steps - k), add || k > 0, set1(scale));
      k += kChain;
    } while (k < steps);
  }
}

// ---- packing ----

template <class T, class... N>
FASTLM_WORD VecF load_words(Singles, const T* p, N... n) {
  return load(p, n...);
}
FASTLM_WORD VecF load_words(Pairs, const bf16* p) { return as_float(load_pairs(p)); }
FASTLM_WORD VecF load_words(Pairs, const bf16* p, int n) { return as_float(load_pairs(p, n)); }

// n values as words, zero up to a whole vector.
template <class E, class T>
inline void pack_row(const T* src, int64_t n, float* dst) {
  constexpr int kStep = kLanes * E::kPer;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, dst += kLanes) store(dst, load_words(E(), src + i));
  if (i < n) store(dst, load_words(E(), src + i, static_cast<int>(n - i)));
}

// Two rows (odd may be null) as one row of words of a sum over rows.
inline void pack_pair(const bf16* even, const bf16* odd, int64_t n, float* dst) {
  for_vectors(n, [&](int64_t i, auto... lanes) {
    const VecH pairs =
        odd ? load_pairs(even + i, odd + i, lanes...) : pair_up(load(even + i, lanes...), zero());
    store(dst + i, as_float(pairs));
  });
}

// Rows as the right operand of a sum over rows: Pairs puts rows 2i and 2i + 1 into one.
template <class E, class T>
inline void pack_rows(const T* src, int64_t stride, int64_t rows, int64_t n, float* dst,
                      int64_t width) {
  for (int64_t r = 0; r < rows; r += E::kPer, src += E::kPer * stride, dst += width) {
    if constexpr (E::kPer == 1) {
      pack_row<E>(src, n, dst);
    } else {
      pack_pair(src, r + 1 < rows ? src + stride : nullptr, n, dst);
    }
  }
  for (int64_t w = words_of(rows, E::kPer); w < steps_of<E>(rows); ++w, dst += width) {
    for (int64_t i = 0; i < width; i += kLanes) store(dst + i, zero());
  }
}

// Scales a row of a product that comes without its factor.
template <class E>
inline void scale_row(float* s, int vectors, float scale) {
  if constexpr (E::kUnit == 1) return;
  for (int j = 0; j < vectors; ++j) store(s + j * kLanes, load(s + j * kLanes) * set1(scale));
}

// Rows as the right operand of a sum along rows: word w of row r goes to dst[w * kBlock + r];
// rows up to the next whole vector become zero.
template <class E, class T>
inline void pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t n, float* dst) {
  const int64_t words = words_of(n, E::kPer);
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      const int64_t left = n - w * E::kPer;
      VecF square[kLanes];
      if (r + kLanes <= rows && left >= kLanes * E::kPer) {
        for (int i = 0; i < kLanes; ++i) {
          square[i] = load_words(E(), src + (r + i) * stride + w * E::kPer);
        }
      } else {
        const int take = static_cast<int>(min_of<int64_t>(left, kLanes * E::kPer));
        for (int i = 0; i < kLanes; ++i) {
          const T* p = src + (r + i) * stride + w * E::kPer;
          if (r + i >= rows) {
            square[i] = zero();
          } else {
            square[i] = take < kLanes * E::kPer ? load_words(E(), p, take) : load_words(E(), p);
          }
        }
      }
      transpose(square);
      const int64_t take = min_of<int64_t>(kLanes, steps_of<E>(n) - w);
      for (int64_t i = 0; i < take; ++i) store(dst + (w + i) * kBlock + r, square[i]);
    }
  }
}

// Asks for rows that are needed soon, to arrive while products run.
template <class T>
inline void prefetch_rows(const T* p, int64_t stride, int64_t rows, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + r * stride + i, 0, 2);
  }
}

// ---- softmax ----

// One kv head of one sequence with the query heads that share it. Row r of the head is query
// r / group of head r % group: all that read the same keys lie together.
struct Head {
  const Attention& a;
  int64_t b, h, group, tq, tk, rows, first_q, first_k;

  Head(const Attention& args, int64_t index)
      : a(args), b(index / a.kv_heads), h(index % a.kv_heads), group(a.heads / a.kv_heads) {
    first_q = a.starts_q == nullptr ? 0 : a.starts_q[b];
    first_k = a.starts_k == nullptr ? 0 : a.starts_k[b];
    tq = a.starts_q == nullptr ? a.tq : a.starts_q[b + 1] - first_q;
    tk = a.starts_k == nullptr ? a.tk : a.starts_k[b + 1] - first_k;
    rows = tq * group;
  }
  int64_t query_head(int64_t r) const { return h * group + (group == 1 ? 0 : r % group); }
  int64_t query(int64_t r) const { return group == 1 ? r : r / group; }
  int64_t position(int64_t r) const { return query(r) + tk - tq; }

  template <class T>
  T* query_row(const HeadRows& x, int64_t r) const {
    return static_cast<T*>(x.data) + b * x.batch + query_head(r) * x.head +
           (first_q + query(r)) * x.row;
  }
  template <class T>
  T* key_row(const HeadRows& x, int64_t j) const {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + (first_k + j) * x.row;
  }
  int64_t lse_at(int64_t r) const {
    return b * a.lse_batch + query_head(r) * a.lse_head + first_q + query(r);
  }

  // The byte of mask_blocks for the block of keys from k0 on, of row r's query and the first head.
  const uint8_t* mask_bytes(int64_t k0, int64_t r) const {
    return a.mask_blocks + b * a.mask_blocks_batch + h * group * a.mask_blocks_head +
           k0 / kBlock * a.mask_blocks_key + query(r) * a.mask_blocks_row;
  }

  // Keys [low, high) that row r can see, masks aside.
  int64_t low(int64_t r) const {
    return a.window == 0 ? 0 : min_of(tk, max_of<int64_t>(0, position(r) - a.window + 1));
  }
  int64_t high(int64_t r) const {
    if (a.causal) return max_of<int64_t>(0, min_of(tk, position(r) + 1));
    return a.window == 0 ? tk : max_of<int64_t>(0, min_of(tk, position(r) + a.window));
  }
  // First row that sees keys up to j, and the row after the last that sees key j.
  int64_t first_row(int64_t j) const {
    const int64_t ahead = a.causal ? 0 : a.window == 0 ? tk + tq : a.window - 1;
    return min_of(rows, max_of<int64_t>(0, (j - ahead - (tk - tq)) * group));
  }
  int64_t last_row(int64_t j) const {
    if (a.window == 0) return rows;
    return min_of(rows, max_of<int64_t>(0, (j + a.window - (tk - tq)) * group));
  }
};

// ---- masks ----

// Calls f(pointer to the mask's first element, hides(x), value(x)) in the mask's own type.
template <class F>
inline void with_mask(const Attention& a, F&& f) {
  switch (a.mask_kind) {
    case MaskKind::kBool:
      return f(
          static_cast<const uint8_t*>(a.mask), [](uint8_t seen) { return seen == 0; },
          [](uint8_t seen) { return seen ? 0.0f : -HUGE_VALF; });
    case MaskKind::kFloat32:
      return f(
          static_cast<const float*>(a.mask), [](float x) { return x == -HUGE_VALF; },
          [](float x) { return x; });
    case MaskKind::kBFloat16:
      return f(
          static_cast<const bf16*>(a.mask), [](bf16 x) { return x.bits == 0xff80; },
          [](bf16 x) { return to_float(x); });
    case MaskKind::kFloat16:
      return f(
          static_cast<const fp16*>(a.mask), [](fp16 x) { return x.bits == 0xfc00; },
          [](fp16 x) { return to_float(x); });
    case MaskKind::kNone:
      return;
  }
}

// The byte of Attention::mask_blocks for the keys [0, n) of a row, `step` apart.
template <class M, class H, class V>
inline uint8_t mask_effect(const M* m, int64_t step, int64_t n, const H& hides, const V& value) {
  int32_t hidden = 0, acting = 0;
  const auto count = [&](M x) {
    hidden += hides(x);
    acting += !(value(x) == 0.0f);
  };
  if (step == 1) {
    for (int64_t j = 0; j < n; ++j) count(m[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) count(m[j * step]);
  }
  if (hidden == n) return 0;
  int64_t end = n;
  if (hidden > 0) {
    while (hides(m[(end - 1) * step])) --end;
  }
  return static_cast<uint8_t>(end | (acting > n - end ? kMaskActs : 0));
}

void read_mask(const Attention& a, int64_t begin, int64_t end) {
  const int64_t rows = a.mask_row == 0 ? 1 : a.tq, heads = a.mask_head == 0 ? 1 : a.heads;
  with_mask(a, [&](const auto* mask, const auto& hides, const auto& value) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % rows, head = i / rows % heads, b = i / rows / heads;
      const auto* m = mask + b * a.mask_batch + head * a.mask_head + row * a.mask_row;
      uint8_t* out = a.mask_blocks + b * a.mask_blocks_batch + head * a.mask_blocks_head + row;
      for (int64_t k0 = 0; k0 < a.tk; k0 += kBlock, out += a.mask_blocks_key) {
        const int64_t n = min_of(kBlock, a.tk - k0);
        *out = mask_effect(m + k0 * a.mask_key, a.mask_key, n, hides, value);
      }
    }
  });
}

// What the mask does to the rows [begin, end) of a head and one block of keys: `reach` keys at the
// least and at the most up to the last one a row sees; `acts` where it hides or adds before that.
struct MaskEffect {
  int64_t least = kBlock, most = kBlock;
  bool acts = false;

  MaskEffect() = default;
  MaskEffect(const Head& head, int64_t k0, int64_t begin, int64_t end) {
    const Attention& a = head.a;
    if (a.mask == nullptr) return;
    least = kBlock, most = 0;
    const uint8_t* at = head.mask_bytes(k0, begin);
    const int64_t queries =
        a.mask_blocks_row == 0 ? 1 : head.query(end - 1) - head.query(begin) + 1;
    const int64_t heads = a.mask_blocks_head == 0 ? 1 : head.group;
    for (int64_t h = 0; h < heads; ++h) {
      const uint8_t* bytes = at + h * a.mask_blocks_head;
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t reach = bytes[i] & ~kMaskActs;
        least = min_of(least, reach);
        most = max_of(most, reach);
        acts |= (bytes[i] & kMaskActs) != 0;
      }
    }
  }
};

// Turns the scaled products of rows and keys [k0, k0 + keys) into scores: soft-cap, slopes, mask,
// and -inf for what a row does not see.
struct Scores {
  const Head& head;
  int64_t k0, keys;
  float* bias;  // [kBlock] room for one row of slopes and mask
  bool filled = false;

  // Whether the products of rows [r0, r1), on which the mask has this effect, are scores already.
  bool plain(int64_t r0, int64_t r1, const MaskEffect& mask) const {
    return head.a.slopes == nullptr && head.a.softcap == 0.0f && keys == kBlock && !mask.acts &&
           mask.least == kBlock && head.high(r0) >= k0 + keys && head.low(r1 - 1) <= k0;
  }

  // Keys in sight of rows up to r1 - 1, on which the mask has this effect, counted from k0.
  int64_t in_sight(int64_t r1, const MaskEffect& mask) const {
    return max_of<int64_t>(0, min_of(min_of(head.high(r1 - 1) - k0, keys), mask.most));
  }

  // slope[j] receives d cap / d s of the soft-cap when wanted.
  void finish(int64_t r, float* s, int vectors, float* slope) {
    const Attention& a = head.a;
    const VecF hidden = set1(-HUGE_VALF);
    const int effect =
        a.mask == nullptr
            ? static_cast<int>(kBlock)
            : head.mask_bytes(k0,
                              r)[(head.query_head(r) - head.h * head.group) * a.mask_blocks_head];
    const bool masked = (effect & kMaskActs) != 0, biased = masked || a.slopes != nullptr;
    if (biased) fill_bias(r, masked);
    const int64_t low = head.low(r) - k0;
    const int64_t high = min_of<int64_t>(min_of(head.high(r) - k0, keys), effect & ~kMaskActs);
    for (int64_t j = 0; j < vectors * kLanes; j += kLanes) {
      VecF x = load(s + j);
      if (a.softcap != 0.0f) {
        VecF falls;
        const VecF cap = set1(a.softcap), t = vtanh(x / cap, &falls);
        if (slope != nullptr) store(slope + j, falls);
        x = cap * t;
      }
      if (biased) x = x + load(bias + j);
      x = select(below(j, high), x, hidden);
      store(s + j, select(below(j, low), hidden, x));
    }
  }

  void fill_bias(int64_t r, bool masked) {
    const Attention& a = head.a;
    const bool same = a.slopes == nullptr && a.mask_row == 0 && a.mask_head == 0;
    if (filled && same) return;
    filled = true;
    for (int64_t j = 0; j < kBlock; j += kLanes) store(bias + j, zero());
    if (a.slopes != nullptr) {
      const float slope = a.slopes[head.b * a.slopes_batch + head.query_head(r)];
      const int64_t away = head.position(r) - k0;
      for (int64_t j = 0; j < keys; ++j) bias[j] = -slope * fabsf(static_cast<float>(away - j));
    }
    if (!masked) return;
    with_mask(a, [&](const auto* mask, const auto&, const auto& value) {
      const auto* m = mask + head.b * a.mask_batch + head.query_head(r) * a.mask_head +
                      head.query(r) * a.mask_row + k0 * a.mask_key;
      if (a.mask_key == 1) {
        for (int64_t j = 0; j < keys; ++j) bias[j] += value(m[j]);
      } else {
        for (int64_t j = 0; j < keys; ++j) bias[j] += value(m[j * a.mask_key]);
      }
    });
  }
};

// Hands out consecutive aligned pieces of a worker's memory; with a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = base == nullptr ? nullptr : base + used;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};
