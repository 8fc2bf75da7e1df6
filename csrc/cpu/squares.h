// The processor's tile registers, where it has them: products of 32 x 32 sums of bf16 pairs.
//
// Eight registers of 16 rows x 64 bytes. Four hold sums, two 16 rows each of a, two 16 columns each
// of b, whose rows are pairs of two following k as everywhere in these kernels. A multiplication
// takes 32 values of k at a time; what is missing of them must be zero on both sides.
//
// Included by the kernel files, inside the set's namespace.
#if defined(__AMX_BF16__)
constexpr bool kFastSquares = true;

// While one lives, this thread's tile registers are ours; they are in their first state afterwards,
// which the operating system does not have to save.
struct SquareRegisters {
  SquareRegisters() {
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];  // of a row
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~SquareRegisters() { _tile_release(); }
  SquareRegisters(const SquareRegisters&) = delete;
};

// Words of a step: 16 pairs of one row of a or of one column of b.
constexpr int64_t kSquareWords = 16;

// sums[32 or 16, 32 or 16] (+)= a b over `steps` times 16 pairs. Rows of a are a_row words apart
// and its steps a_step; b's rows (one pair of k each) b_row. The compiler knows nothing of what
// tile instructions read, hence the barriers.
template <bool kTall, bool kBroad, bool kFetch = false>
inline void square_product(const float* a, int64_t a_row, int64_t a_step, const float* b,
                           int64_t b_row, int64_t steps, float* sums, int64_t sums_row, bool add) {
  constexpr int64_t kAhead = 2;  // steps
  asm volatile("" : : : "memory");
  const int64_t from_a = a_row * 4, from_b = b_row * 4, to = sums_row * 4;
  if (add) {
    _tile_loadd(0, sums, to);
    if constexpr (kBroad) _tile_loadd(1, sums + 16, to);
    if constexpr (kTall) _tile_loadd(2, sums + 16 * sums_row, to);
    if constexpr (kTall && kBroad) _tile_loadd(3, sums + 16 * sums_row + 16, to);
  } else {
    _tile_zero(0);
    if constexpr (kBroad) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kBroad) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += kSquareWords * b_row) {
    if constexpr (kFetch) {  // b comes from L2, and nothing else asks for it in time
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const float* next = b + (kAhead * kSquareWords + i) * b_row;
        __builtin_prefetch(next);
        if constexpr (kBroad) __builtin_prefetch(next + 16);
      }
    }
    _tile_loadd(4, a, from_a);
    _tile_loadd(6, b, from_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBroad) {
      _tile_loadd(7, b + 16, from_b);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTall) {
      _tile_loadd(5, a + 16 * a_row, from_a);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTall && kBroad) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, to);
  if constexpr (kBroad) _tile_stored(1, sums + 16, to);
  if constexpr (kTall) _tile_stored(2, sums + 16 * sums_row, to);
  if constexpr (kTall && kBroad) _tile_stored(3, sums + 16 * sums_row + 16, to);
  asm volatile("" : : : "memory");
}
#else
constexpr bool kFastSquares = false;
#endif
