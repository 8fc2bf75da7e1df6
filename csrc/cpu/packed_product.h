// y = a b^T for many rows, both sides packed: the product inside linear, feed_forward and their
// gradients, where arithmetic and not the weights' traffic sets the time.
// Computes   sums[m, n] = sum_k a(m, k) b(n, k); either side may lie along k or across it
// Algorithm  outer products: a block of b is packed into tiles of two vectors that stay in L2 while
//            panels of a pass by, each packed so that its values are broadcast in order. What is
//            done with a finished tile of sums is the caller's (a sink): store, add, activate.
// Tile       14 rows x 2 vectors (6 x 2 with 16 registers; 32 x 2 in tile registers), 256 operands
//            of k at a time; rows and depth are cut into equal parts, so that no small rest is left
// Traffic    a region of the result reads its rows of b once, its rows of a once per 512 columns
// Numerics   fp32; chains of at most 128 multiply-adds (bf16 384), their sums in order: a value
//            has the same bits whichever region or tile it is computed in
// Source     Goto and van de Geijn, doi:10.1145/1356052.1356053
//
// Included by the kernel files, inside the set's namespace.
#include "cpu/squares.h"

namespace packed {

constexpr int kRows = kLanes == 16 ? 14 : 6;  // of a tile of vectors
constexpr int64_t kCols = 2 * kLanes;         // of a tile
constexpr int64_t kDeep = 256;                // operands of k in a block
constexpr int64_t kWhole = 384;               // operands of k that are not cut into blocks
constexpr int64_t kWide = 1024;               // columns of a block of b
constexpr int64_t kPanel = 16 * kWhole + 16;  // floats of a packed panel of a
constexpr int kTogether = 4;                  // panels or tiles packed at a time

// How values lie in packed operands: floats, or bf16 pairs of two following k where the processor
// multiplies those. Either is a 32-bit word.
struct Vectors {
  struct Registers {};                         // what a thread holds while it computes
  static constexpr int kRows = packed::kRows;  // of a tile
  static constexpr int64_t kUnit = 1;          // operands that a tile takes at a time
  static constexpr int64_t kDeep = packed::kDeep, kWhole = packed::kWhole;
};
struct Singles : Vectors {
  static constexpr int64_t kPer = 1;      // values in an operand
  static constexpr int64_t kChain = 128;  // operands added up one after another
  static VecF add(VecF acc, VecF a, VecF b) { return fma(a, b, acc); }
  template <class T, class... N>
  static VecF along(const T* p, N... n) {  // kLanes operands of one row
    return load(p, n...);
  }
  template <class T, class... N>
  static VecF across(const T* p, int64_t, bool, N... n) {  // one operand of kLanes rows
    return load(p, n...);
  }
};
struct Pairs : Vectors {
  static constexpr int64_t kPer = 2;
  static constexpr int64_t kChain = packed::kWhole;  // the rounding of the result hides their error
  static VecF add(VecF acc, VecF a, VecF b) { return dot2(acc, as_pairs(a), as_pairs(b)); }
  template <class... N>
  static VecF along(const bf16* p, N... n) {
    return as_float(load_pairs(p, n...));
  }
  template <class... N>
  static VecF across(const bf16* p, int64_t stride, bool both, N... n) {
    return as_float(both ? load_pairs(p, p + stride, n...) : pair_up(load(p, n...), zero()));
  }
};
#if defined(__AMX_BF16__)
struct Squares : Pairs {  // in tile registers; a's rows lie as squares of 16 rows x 16 pairs
  using Registers = SquareRegisters;
  static constexpr int kRows = 32;
  static constexpr int64_t kUnit = kSquareWords;
  static constexpr int64_t kDeep = 128, kWhole = 192;  // both sides of a tile stay in L1
};
using PairedEngine = Squares;
#else
using PairedEngine = Pairs;
#endif
template <class T, bool kPaired = kFastPairs>
struct EngineOf {
  using Type = Singles;
};
template <>
struct EngineOf<bf16, true> {
  using Type = PairedEngine;
};
template <class T>
using Engine = typename EngineOf<T>::Type;

// The size of the parts that n falls into: as equal as multiples of `unit` allow, at most `most`.
inline int64_t even_part(int64_t n, int64_t most, int64_t unit) {
  const int64_t parts = max_of<int64_t>((n + most - 1) / most, 1);
  return ((n + parts - 1) / parts + unit - 1) / unit * unit;
}

// Values of k in a block: one more pass over the sums costs more than a block beyond the best size.
template <class E>
inline int64_t depth_of(int64_t k) {
  const int64_t most = k <= E::kWhole * E::kPer ? E::kWhole : E::kDeep;
  return even_part(k, most * E::kPer, kLanes * E::kPer);
}

// Operands of a block of k: whole steps of a tile, those past the last value zero.
template <class E>
inline int64_t steps_of(int64_t depth) {
  return ((depth + E::kPer - 1) / E::kPer + E::kUnit - 1) / E::kUnit * E::kUnit;
}

// Rows whose unfinished sums are kept at a time.
template <class E>
constexpr int64_t kHigh = 512 / E::kRows * E::kRows;

// ---- packing: operand k of row i to to[k * stride + i] for `width` places; those from `rows` on
// may hold anything finite ----

// Rows that run along k: squares of kLanes operands of kLanes rows are turned. Whole vectors are
// stored, and what they write beyond `width` the next ones overwrite.
template <class E, class T>
void pack_along(const T* from, int64_t row_stride, int64_t rows, int64_t depth, int64_t width,
                float* to, int64_t stride) {
  constexpr int64_t kStep = kLanes * E::kPer;
  for (int64_t i0 = 0; i0 < width; i0 += kLanes) {
    const T* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) row[i] = from + min_of(i0 + i, rows - 1) * row_stride;
    const bool part = i0 > 0 && width - i0 < kLanes;  // what follows is there already
    float* place = to + i0;
    for (int64_t k = 0; k < depth; k += kStep, place += kLanes * stride) {
      VecF square[kLanes];
      const int left = static_cast<int>(min_of(kStep, depth - k));
      if (left == kStep) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = E::along(row[i] + k);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = E::along(row[i] + k, left);
      }
      transpose(square);
      const auto operands = static_cast<int>(steps_of<E>(left));
      if (operands == kLanes && !part) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(place + j * stride, square[j]);
      } else {
        for (int j = 0; j < operands; ++j) {
          if (part) {
            store(place + j * stride, square[j], static_cast<int>(width - i0));
          } else {
            store(place + j * stride, square[j]);
          }
        }
      }
    }
  }
}

// Some neighbouring rows, packed for themselves.
struct Piece {
  int64_t first, rows, width;
  float* to;
  int64_t stride;
};

// Rows that lie side by side: several pieces at a time, because the next k is often a page away.
template <class E, class T>
void pack_across(const T* from, int64_t deep, int64_t depth, const Piece* pieces, int count) {
  const int64_t ahead = pieces[count - 1].first + pieces[count - 1].rows - pieces[0].first;
  for (int64_t k = 0, at = 0; k < depth; k += E::kPer, ++at, from += E::kPer * deep) {
    const bool both = k + 1 < depth;
    for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
      const T* row = from + piece->first;
      float* const to = piece->to + at * piece->stride;
      __builtin_prefetch(row + ahead, 0, 2);  // of the next pieces; no hardware does that here
      if (E::kPer == 2 && both) __builtin_prefetch(row + deep + ahead, 0, 2);
      for (int64_t i = 0; i < piece->width; i += kLanes) {
        const int64_t n = max_of<int64_t>(piece->rows - i, 0);
        store(to + i, n >= kLanes ? E::across(row + i, deep, both)
                                  : E::across(row + i, deep, both, static_cast<int>(n)));
      }
    }
  }
  for (int64_t at = (depth + E::kPer - 1) / E::kPer; at < steps_of<E>(depth); ++at) {
    for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
      float* const to = piece->to + at * piece->stride;
      for (int64_t i = 0; i < piece->width; i += kLanes) store(to + i, zero());
    }
  }
}

template <class E, class T>
inline void pack(const Operand& side, int64_t k0, int64_t depth, const Piece* pieces, int count) {
  const T* from = static_cast<const T*>(side.p) + k0 * side.deep;
  if (side.deep != 1) return pack_across<E>(from, side.deep, depth, pieces, count);
  for (const Piece* p = pieces; p < pieces + count; ++p) {
    pack_along<E>(from + p->first * side.along, side.along, p->rows, depth, p->width, p->to,
                  p->stride);
  }
}

// ---- the register tile: sums [kHeight, kCols] of packed a [steps, kHeight] and b [steps, kCols]
// ----

template <class E, int kHeight>
void tile(const float* a, const float* b, int64_t steps, float* sums) {
  int64_t from = 0;
  do {  // chain by chain; a chain of nothing, too
    const int64_t to = min_of(from + E::kChain, steps);
    VecF low[kHeight], high[kHeight];
#pragma GCC unroll 14
    for (int i = 0; i < kHeight; ++i) low[i] = high[i] = zero();
    for (int64_t k = from; k < to; ++k, a += kHeight, b += kCols) {
      const VecF left = load(b), right = load(b + kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < kHeight; ++i) {
        const VecF value = set1(a[i]);
        low[i] = E::add(low[i], value, left);
        high[i] = E::add(high[i], value, right);
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kHeight; ++i) {
      float* const place = sums + i * kCols;
      store(place, from == 0 ? low[i] : load(place) + low[i]);
      store(place + kLanes, from == 0 ? high[i] : load(place + kLanes) + high[i]);
    }
    from = to;
  } while (from < steps);
}

using TileFunction = void (*)(const float*, const float*, int64_t, float*);
template <class E>
constexpr TileFunction kTiles[kRows] = {
    tile<E, 1>,  tile<E, 2>,  tile<E, 3>, tile<E, 4>,  tile<E, 5>,  tile<E, 6>,
#if defined(__AVX512F__)
    tile<E, 7>,  tile<E, 8>,  tile<E, 9>, tile<E, 10>, tile<E, 11>, tile<E, 12>,
    tile<E, 13>, tile<E, 14>,
#endif
};

template <class E>
inline TileFunction tile_of(int64_t rows) {
  return kTiles<E>[rows - 1];
}

// Rows of a as squares, [steps / 16][16 or 32 rows][16 pairs]; what is past the last row is finite.
template <class E>
void pack_squares(const Operand& side, int64_t k0, int64_t depth, int64_t first, int64_t rows,
                  float* to);

#if defined(__AMX_BF16__)
constexpr int64_t kSquare = 16;  // rows, and pairs of a row

template <class E>
void pack_squares(const Operand& side, int64_t k0, int64_t depth, int64_t first, int64_t rows,
                  float* to) {
  const int64_t height = rows > kSquare ? 2 * kSquare : kSquare;
  const bf16* from = static_cast<const bf16*>(side.p) + first * side.along + k0 * side.deep;
  if (side.deep == 1) {
    for (int64_t i = 0; i < height; ++i, to += kSquare) {
      const bf16* row = from + min_of(i, rows - 1) * side.along;
      float* place = to;
      for (int64_t k = 0; k < depth; k += 2 * kSquare, place += height * kSquare) {
        const int64_t left = depth - k;
        store(place, as_float(left >= 2 * kSquare ? load_pairs(row + k)
                                                  : load_pairs(row + k, static_cast<int>(left))));
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += 2 * kSquare) {
    for (int64_t i0 = 0; i0 < height; i0 += kSquare, to += kSquare * kSquare) {
      const int64_t n = rows - i0;
      VecF square[kSquare];
      for (int64_t j = 0, at = k; j < kSquare; ++j, at += 2) {
        const bf16* p = from + at * side.deep + i0;
        const bool both = at + 1 < depth;
        square[j] = at >= depth    ? zero()
                    : n >= kSquare ? Pairs::across(p, side.deep, both)
                                   : Pairs::across(p, side.deep, both, static_cast<int>(n));
      }
      transpose(square);
      for (int64_t j = 0; j < kSquare; ++j) store(to + j * kSquare, square[j]);
    }
  }
}

template <bool kTall>
void square_tile(const float* a, const float* b, int64_t steps, float* sums) {
  constexpr int64_t kSquares = (kTall ? 2 : 1) * kSquare * kSquare;
  square_product<kTall, true, true>(a, kSquare, kSquares, b, kCols, steps / kSquare, sums, kCols,
                                    false);
}
template <>
inline TileFunction tile_of<Squares>(int64_t rows) {
  return rows > kSquare ? square_tile<true> : square_tile<false>;
}
#endif

// Where a tile's sums belong, and whether its chain begins or ends with this block of k.
struct Place {
  int64_t m, rows, n, cols;
  bool first, last;
};

// Floats of scratch memory for one region of a result with `k` values summed.
template <class E>
inline int64_t scratch_floats(int64_t k, bool keeps_sums) {
  const int64_t operands = depth_of<E>(k) / E::kPer;
  return kTogether * kPanel + operands * kWide + (keeps_sums ? kHigh<E> * kWide : 0);
}

// Sums of rows [r.m0, r.m1) x columns [r.n0, r.n1), tile by tile and block of k by block of k, to
// sink(place, sums). `pack_tiles(k0, depth, n, width, to)` packs so many columns of b as tiles.
template <class E, class T, class PackTiles, class Sink>
void product(const Operand& a, int64_t k, const Region& r, float* scratch,
             const PackTiles& pack_tiles, const Sink& sink) {
  const int64_t deep = depth_of<E>(k);
  const int64_t wide = even_part(r.n1 - r.n0, kWide, kCols);
  const int64_t rows = r.m1 - r.m0, panels = (rows + E::kRows - 1) / E::kRows;
  float* const b = scratch + kTogether * kPanel;
  const int together = a.deep == 1 || E::kPer > 1 ? 1 : kTogether;  // one alone stays in L1
  const auto row_of = [&](int64_t panel) {  // in equal parts; a register holds 16, used or not
    return r.m0 + min_of(rows, E::kUnit > 1 ? E::kRows * panel : rows * panel / panels);
  };
  [[maybe_unused]] const typename E::Registers registers;
  alignas(64) float sums[E::kRows * kCols];
  for (int64_t n = r.n0; n < r.n1; n += wide) {
    const int64_t width = min_of(wide, r.n1 - n);
    int64_t k0 = 0;
    do {  // once, for sums of nothing, where k is 0
      const int64_t depth = min_of(deep, k - k0), steps = steps_of<E>(depth);
      pack_tiles(k0, depth, n, width, b);
      Place at{0, 0, 0, 0, k0 == 0, k0 + depth >= k};
      for (int64_t i = 0; i < panels; ++i) {
        at.m = row_of(i);
        at.rows = row_of(i + 1) - at.m;
        const int turn = static_cast<int>(i % together);
        if constexpr (E::kUnit > 1) {
          pack_squares<E>(a, k0, depth, at.m, at.rows, scratch);
        } else if (turn == 0) {
          Piece pieces[kTogether];
          int count = 0;
          for (; count < together && i + count < panels; ++count) {
            const int64_t first = row_of(i + count), high = row_of(i + count + 1) - first;
            pieces[count] = {first, high, high, scratch + count * kPanel, high};
          }
          pack<E, T>(a, k0, depth, pieces, count);
        }
        const float* panel = scratch + turn * kPanel;
        const TileFunction run = tile_of<E>(at.rows);
        for (int64_t j = 0; j < width; j += kCols) {
          at.n = n + j;
          at.cols = min_of(kCols, width - j);
          sink.fetch(at);
          run(panel, b + j * steps, steps, sums);
          sink(at, sums);
        }
      }
      k0 += deep;
    } while (k0 < k);
  }
}

// Calls f(part) for parts of the region whose unfinished sums have room, or for the whole.
template <class E, class F>
inline void in_height(const Region& r, bool keeps_sums, const F& f) {
  constexpr int64_t kStep = E::kUnit > 1 ? E::kRows : 1;
  const int64_t rows = r.m1 - r.m0, high = keeps_sums ? even_part(rows, kHigh<E>, kStep) : rows;
  for (int64_t m = r.m0; m < r.m1; m += high) f({m, min_of(m + high, r.m1), r.n0, r.n1});
}

// Fetches rows of a tile while it is computed: they lie too far apart for the hardware to do so.
template <class T>
inline void fetch_rows(const T* p, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, p += stride) {
    const char* line = reinterpret_cast<const char*>(p);
    __builtin_prefetch(line);
    if (sizeof(T) * kCols > 64) __builtin_prefetch(line + 64);
  }
}

// Where row i of a tile's sums waits for the next block of k: panel by panel, tile by tile.
inline float* waiting(float* kept, const Region& r, const Place& at, int64_t i) {
  return kept + (at.m - r.m0) * kWide + (at.n - r.n0) % kWide * at.rows + i * kCols;
}

// The columns of one matrix as tiles.
template <class E, class T>
inline auto columns_of(const Operand& b) {
  return [&b](int64_t k0, int64_t depth, int64_t n, int64_t width, float* to) {
    const int64_t steps = steps_of<E>(depth);
    const int64_t end = (width + kCols - 1) / kCols * kCols;
    constexpr int kMost = E::kUnit > 1 ? 8 : 1;  // pieces whose rows of b are read side by side
    for (int64_t j = 0; j < end;) {
      Piece pieces[kMost];
      int count = 0;
      for (; count < kMost && j < end; ++count, j += kLanes) {
        const int64_t first = min_of(j, width - 1);  // past the end: the last one again
        float* const place = to + j / kCols * kCols * steps + j % kCols;
        const int64_t rows = min_of<int64_t>(width - first, kLanes);
        pieces[count] = {n + first, rows, kLanes, place, kCols};
      }
      pack<E, T>(b, k0, depth, pieces, count);
    }
  };
}

// f(i) for each whole vector of n values and f(i, lanes) for the rest.
template <class F>
inline void vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Sums to y, with a bias or added to what is there.
template <class T>
struct ToSums {
  const Product& p;
  void fetch(const Place& at) const {
    fetch_rows(static_cast<const float*>(p.y) + at.m * p.ld + at.n, at.rows, p.ld);
  }
  void operator()(const Place& at, float* sums) const {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t r = 0; r < at.rows; ++r, sums += kCols) {
      float* y = static_cast<float*>(p.y) + (at.m + r) * p.ld + at.n;
      vectors(at.cols, [&](int64_t i, auto... n) {
        VecF v = load(sums + i, n...);
        if (!at.first || p.add) {
          v = v + load(y + i, n...);
        } else if (bias) {
          v = v + load(bias + at.n + i, n...);
        }
        store(y + i, v, n...);
      });
    }
  }
};

// Sums rounded to y; unfinished ones wait in `kept`.
template <class T>
struct ToRounded {
  const Product& p;
  const Region& r;
  float* kept;
  void fetch(const Place& at) const {
    if (!at.first || !at.last) fetch_rows(waiting(kept, r, at, 0), at.rows, kCols);
    if (at.last) fetch_rows(static_cast<const T*>(p.y) + at.m * p.ld + at.n, at.rows, p.ld);
  }
  void operator()(const Place& at, float* sums) const {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t i = 0; i < at.rows; ++i, sums += kCols) {
      float* wait = waiting(kept, r, at, i);
      T* y = static_cast<T*>(p.y) + (at.m + i) * p.ld + at.n;
      vectors(at.cols, [&](int64_t j, auto... n) {
        VecF v = load(sums + j, n...);
        if (!at.first) v = v + load(wait + j, n...);
        if (!at.last) return store(wait + j, v, n...);
        if (bias) v = v + load(bias + at.n + j, n...);
        store(y + j, v, n...);
      });
    }
  }
};

}  // namespace packed
