// sample: the next token of a row of logits.
// Computes   p = softmax(z / T) over z_i >= the top_k-th largest, then over the fewest largest that
//            reach top_p together, then over p_i >= min_p max p; the first token whose cumulative
//            probability, in the order of the tokens, exceeds u
// Algorithm  one pass takes the largest logit of every 64. They bound the cuts from below: the k-th
//            largest of them is no larger than the k-th largest of all, and what falls below
//            (1 - top_p) / vocab of the total cannot be in the nucleus. Only candidates above the
//            bound are gathered, and quickselect, by count or by probability, finds the cut in
//            them. Nothing is sorted
// Tile       row [ group of 64 | ... | masked tail ]
// Traffic    reads the logits once, without top_k a second time from cache
// Numerics   fp32 exponentials and sums of 64, fp64 sums of these; equal logits go together
// Source     Holtzman et al., arXiv:1904.09751 (top_p); Nguyen et al., arXiv:2407.01082 (min_p);
//            Hoare, "Algorithm 65: find"
constexpr int64_t kGroup = 64;

// What a row's scratch holds.
struct Candidates {
  float* tops;     // [groups] largest logit of each group, at the end their weights
  float* value;    // [vocab] candidates in the order of the tokens
  float* copy;     // [vocab] the same, for quickselect to disorder
  int32_t* token;  // [vocab] their tokens
  int64_t groups, count;
};

inline int64_t rounded(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t groups_of(int64_t vocab) { return (vocab + kGroup - 1) / kGroup; }
int64_t scratch(int64_t vocab) { return rounded(groups_of(vocab)) + 3 * rounded(vocab); }

inline Candidates candidates(int64_t vocab, float* memory) {
  const int64_t room = rounded(vocab);
  Candidates c{memory, memory + rounded(groups_of(vocab)), nullptr, nullptr, groups_of(vocab), 0};
  c.copy = c.value + room;
  c.token = reinterpret_cast<int32_t*>(c.copy + room);
  return c;
}

// The largest logit of each group, and of all; false for NaN and infinity.
template <class T>
bool find_tops(const T* z, int64_t vocab, const Candidates& c, float* largest) {
  const VecF lowest = set1(-FLT_MAX);
  VecF top = set1(-HUGE_VALF), wrong = zero();
  for (int64_t g = 0; g < c.groups; ++g) {
    const int64_t begin = g * kGroup, n = min_of(kGroup, vocab - begin);
    VecF high = set1(-HUGE_VALF);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const VecF v = load(z + begin + i);
      wrong = fma(vmax(lowest, v), zero(), wrong);  // operand order: a NaN comes through
      high = vmax(high, v);
    }
    if (i < n) {
      const VecF v = load(z + begin + i, static_cast<int>(n - i));
      wrong = fma(vmax(lowest, v), zero(), wrong);
      high = vmax(high, select(below(i, n), v, set1(-HUGE_VALF)));
    }
    c.tops[g] = reduce_max(high);
    top = vmax(top, high);
  }
  *largest = reduce_max(top);
  return reduce_add(wrong) == 0.0f && *largest > -HUGE_VALF;
}

// Candidates are the logits from `bound` on.
template <class T>
void gather(const T* z, int64_t vocab, float bound, Candidates& c) {
  int64_t n = 0;
  for (int64_t g = 0; g < c.groups; ++g) {
    if (c.tops[g] < bound) continue;
    const int64_t end = min_of(vocab, (g + 1) * kGroup);
    for (int64_t i = g * kGroup; i < end; ++i) {
      const float v = ::fastlm::to_float(z[i]);
      c.value[n] = v;
      c.token[n] = static_cast<int32_t>(i);
      n += v >= bound;
    }
  }
  c.count = n;
}

// Drops the candidates below `bound`.
inline void drop(Candidates& c, float bound) {
  int64_t n = 0;
  for (int64_t i = 0; i < c.count; ++i) {
    const float v = c.value[i];
    c.value[n] = v;
    c.token[n] = c.token[i];
    n += v >= bound;
  }
  c.count = n;
}

inline double weight_by_count(float) { return 1.0; }
inline double weight_by_value(float v) { return v; }

// The largest v[i] such that the weights of all values not below it reach `wanted`; disorders v.
template <double (*kWeight)(float)>
float cut(float* v, int64_t n, double wanted) {
  double above = 0.0;  // weight of the values known to be larger
  int64_t begin = 0, end = n;
  float least = v[0];
  while (begin < end) {
    const float a = v[begin], b = v[begin + (end - begin) / 2], d = v[end - 1];
    const float pivot = max_of(min_of(a, b), min_of(max_of(a, b), d));
    // [begin, larger) > pivot, [larger, i) == pivot, [smaller, end) < pivot
    int64_t larger = begin, i = begin, smaller = end;
    double large = 0.0, equal = 0.0;
    while (i < smaller) {
      const float x = v[i];
      if (x > pivot) {
        v[i++] = v[larger];
        v[larger++] = x;
        large += kWeight(x);
      } else if (x < pivot) {
        v[i] = v[--smaller];
        v[smaller] = x;
      } else {
        ++i;
        equal += kWeight(x);
      }
    }
    if (above + large >= wanted) {
      end = larger;
    } else if (above + large + equal >= wanted) {
      return pivot;
    } else {
      above += large + equal;
      begin = smaller;
      least = pivot;
    }
  }
  return least;  // rounding left the total short of `wanted`: everything
}

// e^((z - top) unit) of n logits, which may be the result's own memory; returns their sum.
template <class T>
double exponentials(const T* z, int64_t n, float top, float unit, float* out) {
  const VecF shift = set1(top), scale = set1(unit);
  double total = 0.0;
  for (int64_t b = 0; b < n; b += 1024) {
    const int64_t end = min_of(n, b + 1024);
    VecF sum = zero();
    int64_t i = b;
    for (; i + kLanes <= end; i += kLanes) {
      const VecF e = vexp_falling<6>((load(z + i) - shift) * scale);
      store(out + i, e);
      sum = sum + e;
    }
    if (i < end) {
      const int lanes = static_cast<int>(end - i);
      const VecF e = vexp_falling<6>((load(z + i, lanes) - shift) * scale);
      store(out + i, e, lanes);
      sum = sum + select(below(i, end), e, zero());
    }
    total += reduce_add(sum);
  }
  return total;
}

// The first index whose cumulative weight exceeds u times the total; its weight is not 0. The sums
// of groups, kept in `sums`, find the group, so that only one group is added up in turn.
inline int64_t invert(const float* weight, int64_t n, double u, float* sums) {
  const int64_t groups = groups_of(n);
  double total = 0.0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = min_of(n, (g + 1) * kGroup);
    VecF sum = zero();
    int64_t i = g * kGroup;
    for (; i + kLanes <= end; i += kLanes) sum = sum + load(weight + i);
    if (i < end) sum = sum + load(weight + i, static_cast<int>(end - i));
    sums[g] = reduce_add(sum);
    total += static_cast<double>(sums[g]);
  }
  const double wanted = u * total;
  double before = 0.0;  // weight of the groups passed
  int64_t group = 0, last = 0;
  for (; group < groups; ++group) {
    if (sums[group] > 0.0f) last = group;
    if (before + static_cast<double>(sums[group]) > wanted) break;
    before += static_cast<double>(sums[group]);
  }
  if (group == groups) group = last;  // u next to 1, and rounding
  const int64_t end = min_of(n, (group + 1) * kGroup);
  int64_t found = group * kGroup;
  for (int64_t i = found; i < end; ++i) {
    if (weight[i] > 0.0f) found = i;
    before += static_cast<double>(weight[i]);
    if (before > wanted) break;
  }
  return found;
}

template <class T>
int64_t first_of(const T* z, int64_t vocab, const Candidates& c, float wanted) {
  int64_t g = 0;
  while (c.tops[g] != wanted) ++g;
  int64_t i = g * kGroup;
  while (i + 1 < vocab && ::fastlm::to_float(z[i]) != wanted) ++i;
  return i;
}

template <class T>
bool sample_row(const Sample& a, int64_t row, float* memory) {
  const T* z = static_cast<const T*>(a.logits) + row * a.row_stride;
  const int64_t vocab = a.vocab;
  Candidates c = candidates(vocab, memory);
  float top;
  if (!find_tops(z, vocab, c, &top)) return false;
  if (a.temperature == 0.0f) {
    a.token[row] = first_of(z, vocab, c, top);
    return true;
  }
  const float unit = min_of(1.0f / a.temperature, FLT_MAX);
  double total;
  if (a.top_k < vocab) {
    float bound = -HUGE_VALF;
    if (a.top_k <= c.groups) {
      memcpy(c.copy, c.tops, sizeof(float) * static_cast<size_t>(c.groups));
      bound = cut<weight_by_count>(c.copy, c.groups, static_cast<double>(a.top_k));
    }
    gather(z, vocab, bound, c);
    memcpy(c.copy, c.value, sizeof(float) * static_cast<size_t>(c.count));
    drop(c, cut<weight_by_count>(c.copy, c.count, static_cast<double>(a.top_k)));
    total = exponentials(c.value, c.count, top, unit, c.value);
  } else {
    total = exponentials(z, vocab, top, unit, c.value);
    const double rest = a.top_p < 1.0 ? (1.0 - a.top_p) * total / static_cast<double>(vocab) : 0.0;
    const double least = max_of(rest, a.min_p);
    if (least == 0.0) {
      a.token[row] = invert(c.value, vocab, a.uniform[row], c.tops);
      return true;
    }
    // a little lower, so that rounding cuts nothing that the comparison below would keep
    const double bound = top + a.temperature * (log(least) - 1e-3);
    gather(z, vocab, static_cast<float>(bound) - 1e-6f * fabsf(top), c);
    exponentials(c.value, c.count, top, unit, c.value);
  }
  float least = static_cast<float>(a.min_p);  // the largest exponential is 1
  if (a.top_p < 1.0) {
    memcpy(c.copy, c.value, sizeof(float) * static_cast<size_t>(c.count));
    least = max_of(least, cut<weight_by_value>(c.copy, c.count, a.top_p * total));
  }
  drop(c, least);
  a.token[row] = c.token[invert(c.value, c.count, a.uniform[row], c.tops)];
  return true;
}

bool forward(const Sample& a, int64_t row, float* memory) {
  return with_type(a.dtype, [&]<class T>(const T*) { return sample_row<T>(a, row, memory); });
}

FASTLM_EXPORT(SampleKernels, sample) = {scratch, forward};
