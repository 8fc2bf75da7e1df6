// simd.h spelled in AVX2 + FMA + F16C intrinsics: 8 lanes.
constexpr int kLanes = 8;
using VecF = __m256;
using Mask = __m256;  // all ones or all zeros per lane
using VecH = __m256i;

FASTLM_WORD __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTLM_WORD VecF zero() { return _mm256_setzero_ps(); }
FASTLM_WORD VecF set1(float x) { return _mm256_set1_ps(x); }

FASTLM_WORD VecF widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <class T>
FASTLM_WORD __m128i load_halves(const T* p, int n) {
  alignas(16) T buffer[8] = {};
  memcpy(buffer, p, sizeof(T) * static_cast<size_t>(n));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
template <class T>
FASTLM_WORD void store_halves(T* p, __m128i v, int n) {
  alignas(16) T buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
  memcpy(p, buffer, sizeof(T) * static_cast<size_t>(n));
}
FASTLM_WORD VecF load(const float* p) { return _mm256_loadu_ps(p); }
FASTLM_WORD VecF load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
FASTLM_WORD VecF load(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTLM_WORD VecF load(const bf16* p, int n) { return widen(load_halves(p, n)); }
FASTLM_WORD VecF load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTLM_WORD VecF load(const fp16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
FASTLM_WORD VecF load(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTLM_WORD VecF load(const int8_t* p, int n) {
  alignas(8) int8_t buffer[8] = {};
  memcpy(buffer, p, static_cast<size_t>(n));
  return load(buffer);
}

// The bf16 of a lane, in its lower half.
FASTLM_WORD __m256i narrow_lanes(VecF v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  rounded = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  return _mm256_srli_epi32(rounded, 16);
}
FASTLM_WORD __m128i narrow(VecF v) {
  const __m256i words = narrow_lanes(v);
  const __m256i packed = _mm256_packus_epi32(words, words);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
FASTLM_WORD void store(float* p, VecF v) { _mm256_storeu_ps(p, v); }
FASTLM_WORD void store(float* p, VecF v, int n) { _mm256_maskstore_ps(p, first(n), v); }
FASTLM_WORD void store(bf16* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
}
FASTLM_WORD void store(bf16* p, VecF v, int n) { store_halves(p, narrow(v), n); }
FASTLM_WORD __m128i halve(VecF v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FASTLM_WORD void store(fp16* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halve(v));
}
FASTLM_WORD void store(fp16* p, VecF v, int n) { store_halves(p, halve(v), n); }
FASTLM_WORD void store_two(bf16* p, VecF a, VecF b) {
  const __m256i packed = _mm256_packus_epi32(narrow_lanes(a), narrow_lanes(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
FASTLM_WORD void stream(float* p, VecF v) { _mm256_stream_ps(p, v); }
FASTLM_WORD void stream(bf16* p, VecF v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v));
}
FASTLM_WORD void stream(fp16* p, VecF v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), halve(v));
}
FASTLM_WORD void stream_end() { _mm_sfence(); }

FASTLM_WORD VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
FASTLM_WORD VecF vmax(VecF a, VecF b) { return _mm256_max_ps(a, b); }
FASTLM_WORD VecF vmin(VecF a, VecF b) { return _mm256_min_ps(a, b); }
FASTLM_WORD VecF vabs(VecF v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
FASTLM_WORD VecF vsqrt(VecF v) { return _mm256_sqrt_ps(v); }
FASTLM_WORD VecF vround(VecF v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTLM_WORD Mask less(VecF a, VecF b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
FASTLM_WORD Mask below(int64_t i, int64_t n) {
  const int64_t left = n - i;
  return _mm256_castsi256_ps(first(left <= 0 ? 0 : left >= 8 ? 8 : static_cast<int>(left)));
}
FASTLM_WORD VecF select(Mask m, VecF a, VecF b) { return _mm256_blendv_ps(b, a, m); }
// The sum's last bits are n + 127, which shifted up are 2^n. No denormals: five instructions, not
// nine.
FASTLM_WORD VecF pow2(VecF v, VecF n) {
  const __m256i bits = _mm256_castps_si256(n + set1(12583039.0f));  // 1.5 * 2^23 + 127
  const VecF power = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
  return _mm256_andnot_ps(less(n, set1(-126.0f)), v * power);
}

FASTLM_WORD VecF swap_neighbours(VecF v) { return _mm256_permute_ps(v, 0xb1); }
FASTLM_WORD bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }

FASTLM_WORD float reduce_add(VecF v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTLM_WORD float reduce_max(VecF v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// Lane l of the result sums v[l], l = 0 ... 7.
FASTLM_WORD VecF reduce_lanes(const VecF* v) {
  VecF q[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const VecF a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d));
    q[i] =
        _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
  }
  return _mm256_permute2f128_ps(q[0], q[1], 0x20) + _mm256_permute2f128_ps(q[0], q[1], 0x31);
}

FASTLM_WORD void transpose(VecF (&r)[8]) {
  VecF t[8];
  for (int i = 0; i < 4; ++i) {  // pairs of rows: 2 x 2 blocks of single lanes
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {  // quadruples of rows: 4 x 4 blocks
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[4 * i + j]), b = _mm256_castps_pd(t[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {  // whole 128-bit lanes
    const VecF a = r[i], b = r[i + 4];
    r[i] = _mm256_permute2f128_ps(a, b, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

constexpr bool kFastPairs = false;
FASTLM_WORD VecF as_float(VecH v) { return _mm256_castsi256_ps(v); }
FASTLM_WORD VecH as_pairs(VecF v) { return _mm256_castps_si256(v); }
FASTLM_WORD VecH pair_up(VecF a, VecF b) {
  const __m256i low = _mm256_cvtepu16_epi32(narrow(a)), high = _mm256_cvtepu16_epi32(narrow(b));
  return _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
}
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q) { return pair_up(load(p), load(q)); }
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q, int n) {
  return pair_up(load(p, n), load(q, n));
}
FASTLM_WORD VecH load_pairs(const bf16* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FASTLM_WORD VecH load_pairs(const bf16* p, int n) {  // n values, n < 2 kLanes
  alignas(32) bf16 buffer[16] = {};
  memcpy(buffer, p, sizeof(bf16) * static_cast<size_t>(n));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}
FASTLM_WORD VecH broadcast_pair(const bf16* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);
  return _mm256_set1_epi32(pair);
}
FASTLM_WORD void zip(VecH a, VecH b, VecH& lo, VecH& hi) {
  lo = _mm256_unpacklo_epi16(a, b);
  hi = _mm256_unpackhi_epi16(a, b);
}
FASTLM_WORD void unzip(VecF& lo, VecF& hi) {
  const VecF a = lo, b = hi;
  lo = _mm256_permute2f128_ps(a, b, 0x20);
  hi = _mm256_permute2f128_ps(a, b, 0x31);
}
FASTLM_WORD VecF dot2(VecF acc, VecH a, VecH b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  acc = fma(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
  return fma(_mm256_castsi256_ps(_mm256_and_si256(a, high)),
             _mm256_castsi256_ps(_mm256_and_si256(b, high)), acc);
}

constexpr bool kFastBytes = false;
using VecI = __m256i;
FASTLM_WORD VecI load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FASTLM_WORD VecI set1_int(int32_t i) { return _mm256_set1_epi32(i); }
FASTLM_WORD VecI and_bytes(VecI v, uint8_t b) {
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(b)));
}
FASTLM_WORD VecI flip_bytes(VecI v, uint8_t b) {
  return _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(b)));
}
FASTLM_WORD VecI high_nibbles(VecI v) { return and_bytes(_mm256_srli_epi16(v, 4), 15); }
template <int j>
FASTLM_WORD VecI byte_of(VecI v) {
  return _mm256_and_si256(_mm256_srli_epi32(v, 8 * j), _mm256_set1_epi32(255));
}
template <int kBits>
FASTLM_WORD VecI shift_add(VecI a, VecI b) {
  return _mm256_add_epi32(_mm256_slli_epi32(a, kBits), b);
}
FASTLM_WORD VecF to_lanes(VecI v) { return _mm256_cvtepi32_ps(v); }
FASTLM_WORD VecI dot4(VecI acc, VecI u, VecI s) {
  const __m256i pairs = _mm256_maddubs_epi16(u, s);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
