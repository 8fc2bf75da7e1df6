// x w^T for weights [out, in] as they lie in memory: the product inside linear and feed_forward.
// Computes   sums[m, n] = x[m, :] . w[n, :] for a panel of weight rows
// Algorithm  every pair (row of x, row of w) of a tile has one vector accumulator that runs along
//            k; a shuffle tree turns kLanes accumulators into kLanes sums. Nothing is packed, so
//            weights may change between calls. The rows of w that come next are prefetched, spread
//            over the tiles of x, because the hardware follows no stream across a page.
// Tile       4 rows of x by 4 of w (8 and 16 accumulators fill the registers of AVX2 and AVX-512),
//            2 by 8 for two rows, 1 by 8 streams for one; k in blocks of 4 KiB a row that stay in
//            L1
// Traffic    reads w once from memory, x from L2 once per tile of w
// Numerics   fp32 sums in an order that depends on the shapes only: same bits for any threads
// Source     register tiles along k as in tinyBLAS, justine.lol/matmul
//
// Included by the kernel files, inside the set's namespace.

FASTLM_WORD VecF operand(const float* p) { return load(p); }
FASTLM_WORD VecF operand(const float* p, int n) { return load(p, n); }
FASTLM_WORD VecH operand(const bf16* p) { return load_pairs(p); }
FASTLM_WORD VecH operand(const bf16* p, int n) { return load_pairs(p, n); }
FASTLM_WORD VecF operand(const fp16* p) { return load(p); }
FASTLM_WORD VecF operand(const fp16* p, int n) { return load(p, n); }
FASTLM_WORD VecF multiply_add(VecF acc, VecF a, VecF b) { return fma(a, b, acc); }
FASTLM_WORD VecF multiply_add(VecF acc, VecH a, VecH b) { return dot2(acc, a, b); }

template <class T>
constexpr int kStep = kLanes;  // values in one operand
template <>
constexpr int kStep<bf16> = 2 * kLanes;

constexpr int kTileX = 4;                     // rows of x in a full tile
constexpr int kTileW = kLanes == 16 ? 4 : 2;  // rows of w in it
constexpr int64_t kPanel = 48;                // rows of w that one item of work covers
constexpr int64_t kBlockX = 64;               // rows of x whose sums are held at a time

// A panel's sums, [rows of x][kPanel].
struct Sums {
  alignas(64) float at[kBlockX * kPanel];
};

// One step of every accumulator; the operands of the longer side are used as they are loaded.
template <int MR, int NR, class T, class... N>
FASTLM_WORD void tile_step(const T* x, int64_t ldx, const T* w, int64_t ldw, VecF* acc, N... n) {
  if constexpr (MR < NR) {
    decltype(operand(x)) row[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) row[i] = operand(x + i * ldx, n...);
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const auto weight = operand(w + j * ldw, n...);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i * NR + j] = multiply_add(acc[i * NR + j], row[i], weight);
    }
  } else {
    decltype(operand(w)) weight[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) weight[j] = operand(w + j * ldw, n...);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const auto row = operand(x + i * ldx, n...);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i * NR + j] = multiply_add(acc[i * NR + j], row, weight[j]);
    }
  }
}

// sums[i * kPanel + j] (+)= x[i,:k] . w[j,:k] for i < MR, j < NR; fetches kFetch rows from `next`.
template <int MR, int NR, int kFetch, class T>
inline void tile(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, float* sums, bool add,
                 const T* next) {
  constexpr int kSums = (MR * NR + kLanes - 1) / kLanes * kLanes;
  VecF acc[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) acc[s] = zero();
  int64_t i = 0;
  for (; i + kStep<T> <= k; i += kStep<T>) {
#pragma GCC unroll 8
    for (int j = 0; j < kFetch; ++j) __builtin_prefetch(next + j * ldw + i, 0, 2);
    tile_step<MR, NR>(x + i, ldx, w + i, ldw, acc);
  }
  if (i < k) tile_step<MR, NR>(x + i, ldx, w + i, ldw, acc, static_cast<int>(k - i));
  float total[kSums];
#pragma GCC unroll 8
  for (int s = 0; s < kSums; s += kLanes) store(total + s, reduce_lanes(acc + s));
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      float* sum = sums + m * kPanel + j;
      *sum = add ? *sum + total[m * NR + j] : total[m * NR + j];
    }
  }
}

// `tile` where all NR rows of w are there; a row at a time in the panel's tail.
template <int MR, int NR, int kFetch, class T>
inline void tile_or_tail(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t rows_w,
                         int64_t k, float* sums, bool add, const T* next) {
  if (rows_w >= NR) return tile<MR, NR, kFetch>(x, ldx, w, ldw, k, sums, add, next);
  for (int64_t j = 0; j < rows_w; ++j) {
    tile<MR, 1, 0>(x, ldx, w + j * ldw, ldw, k, sums + j, add, next);
  }
}

template <int MR, int NR, class T>
inline void one_tile_of_x(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t rows_w,
                          int64_t k, float* sums, bool add) {
  for (int64_t j = 0; j < rows_w; j += NR, w += NR * ldw) {
    tile_or_tail<MR, NR, NR>(x, ldx, w, ldw, rows_w - j, k, sums + j, add, w + NR * ldw);
  }
}

// sums[j] = x . w[j,:] for one row of x and rows_w rows of w that follow each other in memory.
//
// From memory: eight streams of neighbouring rows, each fetched a little ahead. One stream alone
// leaves memory waiting, and eight rows abreast end before the processor has seen them coming when
// rows are short. From the caches one stream is fastest, with nothing fetched.
template <class T>
void one_row(const T* x, const T* w, int64_t ldw, int64_t rows_w, int64_t k, float* sums,
             bool near) {
  constexpr int kStreams = 8, kAcross = 4;
  constexpr int64_t kAhead = 1024;  // bytes
  VecF total[kPanel];
  const int64_t each = near ? 0 : rows_w / kStreams;
  for (int64_t r = 0; r < each; ++r) {
    const T* row = w + r * ldw;
    VecF acc[kStreams];
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) acc[j] = zero();
    int64_t i = 0;
    for (; i + kStep<T> <= k; i += kStep<T>) {
#pragma GCC unroll 8
      for (int j = 0; j < kStreams; ++j) {
        const T* from = row + j * each * ldw + i;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead, 0, 2);
        acc[j] = multiply_add(acc[j], operand(x + i), operand(from));
      }
    }
    if (i < k) {
      const int n = static_cast<int>(k - i);
#pragma GCC unroll 8
      for (int j = 0; j < kStreams; ++j) {
        acc[j] = multiply_add(acc[j], operand(x + i, n), operand(row + j * each * ldw + i, n));
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kStreams; ++j) total[j * each + r] = acc[j];
  }
  for (int64_t r = each * kStreams; r < rows_w; ++r) {
    const T* row = w + r * ldw;
    VecF acc[kAcross];
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) acc[j] = zero();
    int64_t i = 0;
    for (; i + kAcross * kStep<T> <= k; i += kAcross * kStep<T>) {
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) {
        const int64_t at = i + j * kStep<T>;
        acc[j] = multiply_add(acc[j], operand(x + at), operand(row + at));
      }
    }
    for (; i + kStep<T> <= k; i += kStep<T>) {
      acc[0] = multiply_add(acc[0], operand(x + i), operand(row + i));
    }
    if (i < k) {
      const int n = static_cast<int>(k - i);
      acc[1] = multiply_add(acc[1], operand(x + i, n), operand(row + i, n));
    }
    total[r] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  }
  const int64_t padded = (rows_w + kLanes - 1) / kLanes * kLanes;  // at most kPanel
  for (int64_t r = rows_w; r < padded; ++r) total[r] = zero();
  for (int64_t r = 0; r < padded; r += kLanes) store(sums + r, reduce_lanes(total + r));
}

template <int kFetch, class T>
inline void some_rows(int64_t rows, const T* x, int64_t ldx, const T* w, int64_t ldw,
                      int64_t rows_w, int64_t k, float* sums, bool add, const T* next) {
  switch (rows) {
    case 1:
      return tile_or_tail<1, kTileW, kFetch>(x, ldx, w, ldw, rows_w, k, sums, add, next);
    case 2:
      return tile_or_tail<2, kTileW, kFetch>(x, ldx, w, ldw, rows_w, k, sums, add, next);
    case 3:
      return tile_or_tail<3, kTileW, kFetch>(x, ldx, w, ldw, rows_w, k, sums, add, next);
    default:
      return tile_or_tail<kTileX, kTileW, kFetch>(x, ldx, w, ldw, rows_w, k, sums, add, next);
  }
}

// sums [rows, rows_w] (+)= x[rows, :k] w[rows_w, :k]^T
template <class T>
void panel_block(const T* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t rows_w,
                 int64_t k, float* sums, bool add) {
  switch (rows) {
    case 2:
      return one_tile_of_x<2, 2 * kTileW>(x, ldx, w, ldw, rows_w, k, sums, add);
    case 3:
      return one_tile_of_x<3, kTileW>(x, ldx, w, ldw, rows_w, k, sums, add);
    case 4:
      return one_tile_of_x<4, kTileW>(x, ldx, w, ldw, rows_w, k, sums, add);
    default:
      break;
  }
  // each tile of x fetches its share of the next tile of w
  const int64_t share = rows <= 12 ? kTileW / 2 : 1;
  for (int64_t j = 0; j < rows_w; j += kTileW, w += kTileW * ldw) {
    const T* next = w + kTileW * ldw;
    for (int64_t m = 0; m < rows; m += kTileX, next += share * ldw) {
      const T* xm = x + m * ldx;
      float* s = sums + m * kPanel + j;
      if (m / kTileX * share >= kTileW) {
        some_rows<0>(rows - m, xm, ldx, w, ldw, rows_w - j, k, s, add, next);
      } else if (share == 1) {
        some_rows<1>(rows - m, xm, ldx, w, ldw, rows_w - j, k, s, add, next);
      } else {
        some_rows<kTileW / 2>(rows - m, xm, ldx, w, ldw, rows_w - j, k, s, add, next);
      }
    }
  }
}

// sums [rows, rows_w] = x [rows, k] w[rows_w, k]^T for rows <= kBlockX, rows_w <= kPanel; rows of w
// are ldw apart. `near` says that w is in the caches, which matters to one row of x.
template <class T>
void panel_product(const T* x, int64_t rows, const T* w, int64_t ldw, int64_t rows_w, int64_t k,
                   Sums* sums, bool near = false) {
  if (rows == 1) return one_row(x, w, ldw, rows_w, k, sums->at, near);
  const int64_t block = rows <= kTileX ? k : 4096 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  do {
    panel_block(x + i, k, rows, w + i, ldw, rows_w, min_of<int64_t>(block, k - i), sums->at, i > 0);
    i += block;
  } while (i < k);
}

// f(offset) for each whole vector of n values and f(offset, lanes) for the rest.
template <class F>
inline void each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(i, static_cast<int>(n - i));
}

// A row of sums at lane i, with the bias of its columns where there is one.
template <class T, class... N>
inline VecF biased(const float* sums, const T* bias, int64_t i, N... n) {
  const VecF v = load(sums + i, n...);
  return bias == nullptr ? v : v + load(bias + i, n...);
}
