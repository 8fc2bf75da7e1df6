// The tests' own row: what load and store of simd.h make of every value.
// Computes   to[i] = from[i], from or to fp32
// Algorithm  vectors where `step` is one, else the tail forms of load and store
// Tile       `step` values
// Traffic    reads from, writes to
// Numerics   rounds to nearest even
// Source     IEEE 754

template <class From, class To>
void convert(const Convert& a) {
  const From* from = static_cast<const From*>(a.from);
  To* to = static_cast<To*>(a.to);
  for (int64_t i = 0; i < a.count; i += a.step) {
    const int64_t n = min_of(a.step, a.count - i);
    if (n == kLanes) {
      store(to + i, load(from + i));
    } else {
      store(to + i, load(from + i, static_cast<int>(n)), static_cast<int>(n));
    }
  }
}

void run(const Convert& a) {
  with_type(a.dtype,
            [&]<class T>(const T*) { a.widen ? convert<T, float>(a) : convert<float, T>(a); });
}

FASTLM_EXPORT(ConvertKernels, convert) = {run};
