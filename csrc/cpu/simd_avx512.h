// simd.h spelled in AVX-512 intrinsics: 16 lanes.
constexpr int kLanes = 16;
using VecF = __m512;
using Mask = __mmask16;
using VecH = __m512i;

FASTLM_WORD Mask first(int n) { return static_cast<Mask>((1u << n) - 1u); }
FASTLM_WORD VecF zero() { return _mm512_setzero_ps(); }
FASTLM_WORD VecF set1(float x) { return _mm512_set1_ps(x); }

// Word l of the half to the upper word of lane l: one instruction, where widening and shifting is
// two.
FASTLM_WORD VecF widen(__m256i half) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaau, _mm512_slli_epi32(lane, 16), _mm512_castsi256_si512(half)));
}
FASTLM_WORD VecF load(const float* p) { return _mm512_loadu_ps(p); }
FASTLM_WORD VecF load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
FASTLM_WORD VecF load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTLM_WORD VecF load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
FASTLM_WORD VecF load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTLM_WORD VecF load(const fp16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
FASTLM_WORD VecF load(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FASTLM_WORD VecF load(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}

FASTLM_WORD __m256i narrow(VecF v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
FASTLM_WORD void store(float* p, VecF v) { _mm512_storeu_ps(p, v); }
FASTLM_WORD void store(float* p, VecF v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
FASTLM_WORD void store(bf16* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}
FASTLM_WORD void store(bf16* p, VecF v, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
FASTLM_WORD __m256i halve(VecF v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FASTLM_WORD void store(fp16* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halve(v));
}
FASTLM_WORD void store(fp16* p, VecF v, int n) { _mm256_mask_storeu_epi16(p, first(n), halve(v)); }
FASTLM_WORD void store_two(bf16* p, VecF a, VecF b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}
FASTLM_WORD void stream(float* p, VecF v) { _mm512_stream_ps(p, v); }
FASTLM_WORD void stream(bf16* p, VecF v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}
FASTLM_WORD void stream(fp16* p, VecF v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halve(v));
}
FASTLM_WORD void stream_end() { _mm_sfence(); }

FASTLM_WORD VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
FASTLM_WORD VecF vmax(VecF a, VecF b) { return _mm512_max_ps(a, b); }
FASTLM_WORD VecF vmin(VecF a, VecF b) { return _mm512_min_ps(a, b); }
FASTLM_WORD VecF vabs(VecF v) { return _mm512_abs_ps(v); }
FASTLM_WORD VecF vsqrt(VecF v) { return _mm512_sqrt_ps(v); }
FASTLM_WORD VecF vround(VecF v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTLM_WORD VecF pow2(VecF v, VecF n) { return _mm512_scalef_ps(v, n); }

FASTLM_WORD Mask less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FASTLM_WORD Mask below(int64_t i, int64_t n) {
  const int64_t left = n - i;
  return left <= 0 ? 0 : left >= 16 ? static_cast<Mask>(0xffff) : first(static_cast<int>(left));
}
FASTLM_WORD VecF select(Mask m, VecF a, VecF b) { return _mm512_mask_mov_ps(b, m, a); }

FASTLM_WORD VecF swap_neighbours(VecF v) { return _mm512_permute_ps(v, 0xb1); }
FASTLM_WORD bool any(Mask m) { return m != 0; }

// Not _mm512_reduce_*: GCC 12 warns of an uninitialised operand inside them.
FASTLM_WORD __m256 lower_half(VecF v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
FASTLM_WORD __m256 upper_half(VecF v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
FASTLM_WORD float reduce_add(VecF v) {
  const __m256 h = _mm256_add_ps(lower_half(v), upper_half(v));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTLM_WORD float reduce_max(VecF v) {
  const __m256 h = _mm256_max_ps(lower_half(v), upper_half(v));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// Lane l of the result sums v[l], l = 0 ... 15.
FASTLM_WORD VecF reduce_lanes(const VecF* v) {
  VecF q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const VecF a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    q[i] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  }
  const VecF low = _mm512_shuffle_f32x4(q[0], q[1], 0x88) + _mm512_shuffle_f32x4(q[0], q[1], 0xdd);
  const VecF high = _mm512_shuffle_f32x4(q[2], q[3], 0x88) + _mm512_shuffle_f32x4(q[2], q[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

FASTLM_WORD void transpose(VecF (&r)[16]) {
  VecF t[16];
  for (int i = 0; i < 8; ++i) {  // pairs of rows: 2 x 2 blocks of single lanes
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // quadruples of rows: 4 x 4 blocks
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {  // whole 128-bit lanes
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

#if defined(__AVX512BF16__)
constexpr bool kFastPairs = true;
#else
constexpr bool kFastPairs = false;
#endif
FASTLM_WORD VecF as_float(VecH v) { return _mm512_castsi512_ps(v); }
FASTLM_WORD VecH as_pairs(VecF v) { return _mm512_castps_si512(v); }
// Words l of two halves to lane l.
FASTLM_WORD VecH pair_words(__m256i a, __m256i b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i both = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                        _mm512_set1_epi32(0x200000));
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), both, _mm512_castsi256_si512(b));
}
FASTLM_WORD VecH pair_up(VecF a, VecF b) { return pair_words(narrow(a), narrow(b)); }
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q) {
  return pair_words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
}
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q, int n) {
  return pair_words(_mm256_maskz_loadu_epi16(first(n), p), _mm256_maskz_loadu_epi16(first(n), q));
}
FASTLM_WORD VecH load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
FASTLM_WORD VecH load_pairs(const bf16* p, int n) {  // n values, n < 2 kLanes
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1u), p);
}
FASTLM_WORD VecH broadcast_pair(const bf16* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
FASTLM_WORD void zip(VecH a, VecH b, VecH& lo, VecH& hi) {
  lo = _mm512_unpacklo_epi16(a, b);
  hi = _mm512_unpackhi_epi16(a, b);
}
FASTLM_WORD void unzip(VecF& lo, VecF& hi) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const VecF a = lo, b = hi;
  lo = _mm512_permutex2var_ps(a, first, b);
  hi = _mm512_permutex2var_ps(a, second, b);
}
FASTLM_WORD VecF dot2(VecF acc, VecH a, VecH b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  acc = fma(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
            _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), acc);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
             _mm512_castsi512_ps(_mm512_and_si512(b, high)), acc);
#endif
}

#if defined(__AVX512VNNI__)
constexpr bool kFastBytes = true;
#else
constexpr bool kFastBytes = false;
#endif
using VecI = __m512i;
FASTLM_WORD VecI load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
FASTLM_WORD VecI set1_int(int32_t i) { return _mm512_set1_epi32(i); }
FASTLM_WORD VecI and_bytes(VecI v, uint8_t b) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(b)));
}
FASTLM_WORD VecI flip_bytes(VecI v, uint8_t b) {
  return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(b)));
}
FASTLM_WORD VecI high_nibbles(VecI v) { return and_bytes(_mm512_srli_epi16(v, 4), 15); }
template <int j>
FASTLM_WORD VecI byte_of(VecI v) {
  return _mm512_and_si512(_mm512_srli_epi32(v, 8 * j), _mm512_set1_epi32(255));
}
template <int kBits>
FASTLM_WORD VecI shift_add(VecI a, VecI b) {
  return _mm512_add_epi32(_mm512_slli_epi32(a, kBits), b);
}
FASTLM_WORD VecF to_lanes(VecI v) { return _mm512_cvtepi32_ps(v); }
FASTLM_WORD VecI dot4(VecI acc, VecI u, VecI s) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, u, s);
#else
  const __m512i pairs = _mm512_maddubs_epi16(u, s);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
