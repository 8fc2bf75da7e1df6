// Loops that kernels over rows are made of. Included by the kernel files, inside the set's
// namespace.
// Calls f(offset) for each whole vector of a row and f(offset, lanes) once for its tail.
template <class F>
inline void for_vectors(int64_t cols, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) f(i);
  if (i < cols) f(i, static_cast<int>(cols - i));
}

// Stores a vector of a result, past the caches where the result is too large for them.
template <class T>
inline void put(bool past_cache, T* p, VecF v) {
  if (past_cache) {
    stream(p, v);
  } else {
    store(p, v);
  }
}
template <class T>
inline void put(bool, T* p, VecF v, int n) {
  store(p, v, n);
}

// N sums over a row, in a fixed order: f(sums, offset[, lanes]) adds one vector's terms to N
// vectors. Several chains of additions hide their latency; lanes past the tail do not count. A
// chain ends after 32 terms and goes to a sum in double, or a wide row would lose digits.
template <int N, class F>
inline void row_sums(int64_t cols, double* out, F&& f) {
  constexpr int kChains = N > 2 ? 2 : 4;
  constexpr int64_t kStep = kChains * kLanes, kBlock = 32 * kStep;
  for (int k = 0; k < N; ++k) out[k] = 0.0;
  int64_t i = 0;
  do {
    VecF sums[kChains][N];
    for (auto& chain : sums) {
      for (VecF& v : chain) v = zero();
    }
    const int64_t end = cols - i < kBlock ? cols : i + kBlock;
    for (; i + kStep <= end; i += kStep) {
      for (int c = 0; c < kChains; ++c) f(sums[c], i + c * kLanes);
    }
    for (; i + kLanes <= end; i += kLanes) f(sums[0], i);
    if (i < end) {
      VecF tail[N];
      for (VecF& v : tail) v = zero();
      f(tail, i, static_cast<int>(end - i));
      for (int k = 0; k < N; ++k) {
        sums[1][k] = sums[1][k] + select(below(i, end), tail[k], zero());
      }
      i = end;
    }
    for (int k = 0; k < N; ++k) {
      VecF sum = sums[0][k] + sums[1][k];
      for (int c = 2; c < kChains; c += 2) sum = sum + (sums[c][k] + sums[c + 1][k]);
      out[k] += static_cast<double>(reduce_add(sum));
    }
  } while (i < cols);
}

// Rows [begin, end) of block b when `rows` are cut into `blocks` nearly equal parts. The cut does
// not depend on the number of threads, so neither do the sums made per block.
inline int64_t block_start(int64_t b, int64_t rows, int64_t blocks) { return rows * b / blocks; }
