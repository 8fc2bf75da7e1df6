// Two vectors that go through a function together, instruction by instruction: a processor waits
// for the steps of a long chain, and its window holds more of what it could do meanwhile. Functions
// that are to take either kind are templates of it. Included by math.h.
struct Two {
  VecF a, b;
};
struct TwoMasks {
  Mask a, b;
};
struct Both {};  // where a load or store takes a number of lanes: two whole vectors

template <class... V>
constexpr bool kSomeTwo = (__is_same(V, Two) || ...);

FASTLM_WORD VecF first_of(VecF v) { return v; }
FASTLM_WORD VecF first_of(Two v) { return v.a; }
FASTLM_WORD VecF second_of(VecF v) { return v; }
FASTLM_WORD VecF second_of(Two v) { return v.b; }

#define FASTLM_TWO(f)                               \
  template <class... V>                             \
    requires kSomeTwo<V...>                         \
  FASTLM_WORD Two f(V... v) {                       \
    return {f(first_of(v)...), f(second_of(v)...)}; \
  }
FASTLM_TWO(fma)
FASTLM_TWO(vmax)
FASTLM_TWO(vmin)
FASTLM_TWO(vabs)
FASTLM_TWO(vround)
FASTLM_TWO(pow2)
#undef FASTLM_TWO

#define FASTLM_TWO(sign)                                                   \
  template <class V, class W>                                              \
    requires kSomeTwo<V, W>                                                \
  FASTLM_WORD Two operator sign(V x, W y) {                                \
    return {first_of(x) sign first_of(y), second_of(x) sign second_of(y)}; \
  }
FASTLM_TWO(+)
FASTLM_TWO(-)
FASTLM_TWO(*)
FASTLM_TWO(/)
#undef FASTLM_TWO

template <class V, class W>
  requires kSomeTwo<V, W>
FASTLM_WORD TwoMasks less(V x, W y) {
  return {less(first_of(x), first_of(y)), less(second_of(x), second_of(y))};
}
template <class V, class W>
FASTLM_WORD Two select(TwoMasks m, V x, W y) {
  return {select(m.a, first_of(x), first_of(y)), select(m.b, second_of(x), second_of(y))};
}

template <class T>
FASTLM_WORD Two load(const T* p, Both) {
  return {load(p), load(p + kLanes)};
}
template <class T>
FASTLM_WORD void store(T* p, Two v, Both) {
  store(p, v.a);
  store(p + kLanes, v.b);
}
FASTLM_WORD void store(bf16* p, Two v, Both) { store_two(p, v.a, v.b); }
