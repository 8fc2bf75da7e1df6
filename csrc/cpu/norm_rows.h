// Row loops that both norms are made of. Included by the kernel files, inside the set's namespace.

// Calls f(offset) for each whole vector of a row and f(offset, lanes) once for its tail.
template <class F>
inline void for_vectors(int64_t cols, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) f(i);
  if (i < cols) f(i, static_cast<int>(cols - i));
}

// Rows [begin, end) of block b when `rows` are cut into `blocks` nearly equal parts. The cut does
// not depend on the number of threads, so neither do the sums made per block.
inline int64_t block_start(int64_t b, int64_t rows, int64_t blocks) { return rows * b / blocks; }
