// simd.h spelled in GCC vector extensions: 4 lanes, any processor.
constexpr int kLanes = 4;
typedef float VecF __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));  // all ones or all zeros per lane
typedef uint32_t VecU __attribute__((vector_size(16)));
typedef uint16_t VecW __attribute__((vector_size(8)));
#if defined(__ARM_FP16_FORMAT_IEEE)
typedef __fp16 VecHalf __attribute__((vector_size(8)));
#endif
typedef uint32_t VecH __attribute__((vector_size(16)));  // a bf16 pair per lane

FASTLM_WORD VecF zero() { return VecF{}; }
FASTLM_WORD VecF set1(float x) { return VecF{x, x, x, x}; }
FASTLM_WORD VecF as_float(VecU bits) { return reinterpret_cast<VecF>(bits); }
FASTLM_WORD VecU as_bits(VecF v) { return reinterpret_cast<VecU>(v); }

FASTLM_WORD VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_WORD VecF load(const bf16* p) {
  VecW half;
  memcpy(&half, p, sizeof half);
  return as_float(__builtin_convertvector(half, VecU) << 16);
}
FASTLM_WORD VecF
load(const fp16* p) {  // exact, denormals included; by hand where no processor may help
#if defined(__ARM_FP16_FORMAT_IEEE)
  VecHalf half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, VecF);
#else
  VecW half;
  memcpy(&half, p, sizeof half);
  const VecU words = __builtin_convertvector(half, VecU), size = words & 0x7fffu;
  const VecU normal = (size << 13) + 0x38000000u, endless = size << 13 | 0x7f800000u;
  const VecF tiny = __builtin_convertvector(reinterpret_cast<Mask>(size), VecF) * 0x1p-24f;
  VecU bits = size < 0x400u ? as_bits(tiny) : size < 0x7c00u ? normal : endless;
  return as_float(bits | (words & 0x8000u) << 16);
#endif
}
FASTLM_WORD VecF load(const int8_t* p) {
  return VecF{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
              static_cast<float>(p[3])};
}
template <class T>
FASTLM_WORD VecF load(const T* p, int n) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, sizeof(T) * static_cast<size_t>(n));
  return load(buffer);
}

FASTLM_WORD void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
FASTLM_WORD void store(bf16* p, VecF v) {
  const VecU bits = as_bits(v);
  const VecU rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VecU nan = reinterpret_cast<VecU>(v != v);
  const VecU words = (nan & (bits >> 16 | 0x40u)) | (~nan & rounded);
  const VecW half = __builtin_convertvector(words, VecW);
  memcpy(p, &half, sizeof half);
}
FASTLM_WORD void store(fp16* p, VecF v) {
#if defined(__ARM_FP16_FORMAT_IEEE)
  const VecHalf half = __builtin_convertvector(v, VecHalf);
#else
  const VecU bits = as_bits(v), size = bits & 0x7fffffffu;
  const VecU normal = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  // adding 1/2 lines the last bit of a denormal up with the float's
  const VecU tiny = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
  const VecU infinite = VecU{} + 0x7c00u, nan = VecU{} + 0x7e00u;
  const VecU large = size > 0x7f800000u ? nan : infinite;
  const VecU words = size < 0x38800000u ? tiny : size < 0x477ff000u ? normal : large;
  const VecW half = __builtin_convertvector(words | (bits >> 16 & 0x8000u), VecW);
#endif
  memcpy(p, &half, sizeof half);
}
template <class T>
FASTLM_WORD void store(T* p, VecF v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, sizeof(T) * static_cast<size_t>(n));
}
FASTLM_WORD void store_two(bf16* p, VecF a, VecF b) {
  store(p, a);
  store(p + kLanes, b);
}
template <class T>
FASTLM_WORD void stream(T* p, VecF v) {
  store(p, v);
}
FASTLM_WORD void stream_end() {}

FASTLM_WORD VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
FASTLM_WORD VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
FASTLM_WORD VecF vmin(VecF a, VecF b) { return a < b ? a : b; }
FASTLM_WORD VecF vabs(VecF v) { return as_float(as_bits(v) & 0x7fffffffu); }
FASTLM_WORD VecF vsqrt(VecF v) { return VecF{sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3])}; }
// Adding and taking off 1.5 * 2^23 leaves the nearest integer for |v| < 2^22.
FASTLM_WORD VecF vround(VecF v) {
  const VecF magic = set1(12582912.0f);
  VecF shifted = v + magic;
  asm("" : "+m"(shifted));  // keeps the compiler from folding the pair away
  return shifted - magic;
}

FASTLM_WORD Mask less(VecF a, VecF b) { return a < b; }
FASTLM_WORD Mask below(int64_t i, int64_t n) {
  const int64_t left = n - i;
  const int32_t k = left <= 0 ? 0 : left >= 4 ? 4 : static_cast<int32_t>(left);
  return Mask{0, 1, 2, 3} < Mask{k, k, k, k};
}
FASTLM_WORD VecF select(Mask m, VecF a, VecF b) { return m ? a : b; }
// The sum's last bits are n + 127, which shifted up are 2^n.
FASTLM_WORD VecF pow2(VecF v, VecF n) {
  const VecF power = as_float(as_bits(n + set1(12583039.0f)) << 23);  // 1.5 * 2^23 + 127
  return select(less(n, set1(-126.0f)), zero(), v * power);
}

FASTLM_WORD VecF swap_neighbours(VecF v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2); }
FASTLM_WORD bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }

FASTLM_WORD float reduce_add(VecF v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FASTLM_WORD float reduce_max(VecF v) { return max_of(max_of(v[0], v[2]), max_of(v[1], v[3])); }

// Lane l of the result sums v[l], l = 0 ... 3.
FASTLM_WORD VecF reduce_lanes(const VecF* v) {
  const VecF ab = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5) +
                  __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const VecF cd = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5) +
                  __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

FASTLM_WORD void transpose(VecF (&r)[4]) {
  const VecF a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = VecF{a[i], b[i], c[i], d[i]};
}

constexpr bool kFastPairs = false;
FASTLM_WORD VecH as_pairs(VecF v) { return as_bits(v); }
FASTLM_WORD VecH pair_up(VecF a, VecF b) {
  bf16 halves[8];
  store(halves, a);
  store(halves + 4, b);
  VecH pairs;
  for (int i = 0; i < 4; ++i) {
    pairs[i] = halves[i].bits | static_cast<uint32_t>(halves[i + 4].bits) << 16;
  }
  return pairs;
}
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q) { return pair_up(load(p), load(q)); }
FASTLM_WORD VecH load_pairs(const bf16* p, const bf16* q, int n) {
  return pair_up(load(p, n), load(q, n));
}
FASTLM_WORD VecH load_pairs(const bf16* p) {
  VecH v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_WORD VecH load_pairs(const bf16* p, int n) {  // n values, n < 2 kLanes
  bf16 buffer[2 * kLanes] = {};
  memcpy(buffer, p, sizeof(bf16) * static_cast<size_t>(n));
  return load_pairs(buffer);
}
FASTLM_WORD VecH broadcast_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return VecH{pair, pair, pair, pair};
}
FASTLM_WORD void zip(VecH a, VecH b, VecH& lo, VecH& hi) {
  typedef uint16_t VecS __attribute__((vector_size(16)));
  const VecS x = reinterpret_cast<VecS>(a), y = reinterpret_cast<VecS>(b);
  lo = reinterpret_cast<VecH>(__builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11));
  hi = reinterpret_cast<VecH>(__builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15));
}
FASTLM_WORD void unzip(VecF&, VecF&) {}  // lo and hi are in order already
FASTLM_WORD VecF dot2(VecF acc, VecH a, VecH b) {
  acc = fma(as_float(a << 16), as_float(b << 16), acc);
  return fma(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), acc);
}

constexpr bool kFastBytes = false;
typedef int32_t VecI __attribute__((vector_size(16)));
FASTLM_WORD VecI load_bytes(const uint8_t* p) {
  VecI v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_WORD VecI set1_int(int32_t i) { return VecI{i, i, i, i}; }
FASTLM_WORD int32_t four_bytes(uint8_t b) { return static_cast<int32_t>(b * 0x01010101u); }
FASTLM_WORD VecI and_bytes(VecI v, uint8_t b) { return v & four_bytes(b); }
FASTLM_WORD VecI flip_bytes(VecI v, uint8_t b) { return v ^ four_bytes(b); }
FASTLM_WORD VecI high_nibbles(VecI v) { return and_bytes(v >> 4, 15); }
template <int j>
FASTLM_WORD VecI byte_of(VecI v) {
  return (v >> (8 * j)) & 255;
}
template <int kBits>
FASTLM_WORD VecI shift_add(VecI a, VecI b) {
  return (a << kBits) + b;
}
FASTLM_WORD VecF to_lanes(VecI v) { return __builtin_convertvector(v, VecF); }
// Products of bytes fit words; even and odd bytes apart, then the words of a lane are added.
FASTLM_WORD VecI dot4(VecI acc, VecI u, VecI s) {
  typedef int16_t VecS __attribute__((vector_size(16)));
  typedef uint16_t VecUS __attribute__((vector_size(16)));
  const VecUS uw = reinterpret_cast<VecUS>(u), sw = reinterpret_cast<VecUS>(s);
  const VecS even = reinterpret_cast<VecS>(uw & 255) * (reinterpret_cast<VecS>(sw << 8) >> 8);
  const VecS odd = reinterpret_cast<VecS>(uw >> 8) * (reinterpret_cast<VecS>(sw) >> 8);
  const VecI a = reinterpret_cast<VecI>(even), b = reinterpret_cast<VecI>(odd);
  return acc + ((a << 16) >> 16) + (a >> 16) + ((b << 16) >> 16) + (b >> 16);
}
