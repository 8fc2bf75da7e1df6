// attention forward; the backward is in attention_backward.h.
// Computes   out_i = sum_j softmax_j(s_ij) v_j, s_ij = cap(scale q_i.k_j) - slope |p_i-j| + mask_ij
// Algorithm  a task owns some query blocks of one kv head (rows of all heads that share it) and
//            walks the key blocks they see, packing each once: k transposed, v as it is (fp32 rows
//            that lie well: in place). Then scores in register tiles, exponentials, weights times v
//            into an fp32 block; sums are rescaled only when a maximum grows
// Tile       64 queries x 64 keys; key blocks outside all sight, by position or by the mask, are
//            skipped; columns past the last one seen are left out per group of 6 rows (32 in tile
//            registers)
// Traffic    q, out once; k, v once per task from cache; nothing of size tq x tk is ever stored
// Numerics   fp32 scores, softmax and sums; bf16 products of bf16 pairs with fp32 sums where the
//            processor has them, weights then rounded to bf16; blocks start at fixed rows, so the
//            bits depend neither on threads nor on tasks; rows that see nothing give 0 and -inf
// Source     arXiv:2307.08691, algorithm 1
#include "cpu/norm_rows.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_backward.h"

template <class E>
struct ForwardMemory {
  int64_t q_width, o_width, v_width;
  float *own_q, *o, *sums, *maxima, *keys, *own_values, *scores, *weights, *bias;
  const float *q, *values;  // packed, or where they lie if they can be read there
  int64_t floats;

  ForwardMemory(const AttentionForward& f, float* base) {
    const Attention& a = f.a;
    constexpr int64_t kStep = 32;  // a product may write rows up to a multiple of it
    const int64_t all = (a.tq * (a.heads / a.kv_heads) + kStep - 1) / kStep * kStep;
    const int64_t rows = min_of(all, kBlock * f.blocks_per_task), block = min_of(rows, kBlock);
    Arena arena{base};
    q_width = padded(words_of(a.d, E::kPer));
    o_width = v_width = padded(a.dv);
    q = own_q = arena.take(rows * q_width);
    o = arena.take(rows * o_width);
    sums = arena.take(rows * kLanes);  // one partial sum per lane
    maxima = arena.take(rows);
    keys = arena.take(steps_of<E>(a.d) * kBlock);
    values = own_values = arena.take(kBlock / E::kPer * o_width);
    scores = arena.take(block * kBlock);
    weights = E::kPer == 1 ? scores : arena.take(block * kBlock / E::kPer);
    bias = arena.take(kBlock);
    floats = arena.used;
  }
};

FASTLM_WORD void store_weights(Singles, float* row, int64_t j, VecF a, VecF b) {
  store(row + j, a);
  store(row + j + kLanes, b);
}
FASTLM_WORD void store_weights(Pairs, float* row, int64_t j, VecF a, VecF b) {
  store_two(reinterpret_cast<bf16*>(row) + j, a, b);
}

constexpr int kRowVectors = static_cast<int>(kBlock / kLanes);

inline VecF largest(const float* s, int vectors) {
  VecF top = load(s);
  for (int j = 1; j < vectors; ++j) top = vmax(top, load(s + j * kLanes));
  return top;
}

// Weights e^(s - shift) of a whole row of plain scores, stored; returns sum + their lane-wise sum.
// The shift's rounding in base 2 is the same for all of them and divides out.
template <class E>
inline VecF weigh_plain(const float* s, float shift, VecF sum, float* w) {
  constexpr float kLog2E = 1.44269504088896341f;
  const VecF base = set1(-shift * kLog2E), unit = set1(kLog2E);
#pragma GCC unroll 8
  for (int j = 0; j < kRowVectors; j += 2) {
    const Two e = vexp2_falling<E::kDegree>(fma(load(s + j * kLanes, Both()), unit, base));
    sum = sum + (e.a + e.b);
    store_weights(E(), w, j * kLanes, e.a, e.b);
  }
  return sum;
}

// The same for scores of any size, -inf among them.
template <class E>
inline VecF weigh(const float* s, int vectors, float shift, VecF sum, float* w) {
  const VecF base = set1(shift == -HUGE_VALF ? 0.0f : shift);
  int j = 0;
  for (; j + 1 < vectors; j += 2) {
    const Two e = vexp_falling<E::kDegree>(load(s + j * kLanes, Both()) - base);
    sum = sum + (e.a + e.b);
    store_weights(E(), w, j * kLanes, e.a, e.b);
  }
  if (j < vectors) {
    const VecF e = vexp_falling<E::kDegree>(load(s + j * kLanes) - base);
    sum = sum + e;
    store_weights(E(), w, j * kLanes, e, zero());
  }
  return sum;
}

// A row's maximum follows its scores only when they pass it by this much: weights up to e^8 lose
// nothing in floating point, and hardly any row has to be rescaled after its first block.
constexpr float kSlack = 8.0f;

// Takes the row's new maximum into account: what was summed so far shrinks.
template <class E>
[[gnu::noinline]] void raise_maximum(const ForwardMemory<E>& m, int64_t row, float larger,
                                     bool started) {
  const float before = m.maxima[row];
  m.maxima[row] = larger;
  const VecF factor = vexp_falling<E::kDegree>(set1(before - larger));
  float *sums = m.sums + row * kLanes, *o = m.o + row * m.o_width;
  store(sums, load(sums) * factor);
  if (!started) return;
  for (int64_t d = 0; d < m.o_width; d += kLanes) store(o + d, load(o + d) * factor);
}

// One block of queries against one block of keys. `local` is the block's first row in the task.
template <class E>
[[gnu::noinline]] void forward_block(const AttentionForward& f, const ForwardMemory<E>& m,
                                     Scores& scores, const MaskEffect& mask, int64_t r0,
                                     int64_t rows, int64_t local, bool started) {
  const Head& head = scores.head;
  const int64_t weight_width = kBlock / E::kPer;
  const bool plain = scores.plain(r0, r0 + rows, mask);
  int64_t seen[(kBlock + kTileRows - 1) / kTileRows];  // keys in sight of each group's last row
  for (int64_t i = 0; i < rows; i += E::kGroup) {
    const int n = static_cast<int>(min_of<int64_t>(E::kGroup, rows - i));
    const int64_t r1 = r0 + i + n;
    const int64_t keys =
        scores.in_sight(r1, plain ? mask : MaskEffect(head, scores.k0, r0 + i, r1));
    seen[i / E::kGroup] = keys;
    row_group<E>(n, vectors_of(keys), words_of(f.a.d, E::kPer),
                 {m.q + (local + i) * m.q_width, m.q_width, 1}, {m.keys, kBlock},
                 {m.scores + i * kBlock, kBlock}, false, f.a.scale);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int vectors = vectors_of(seen[i / E::kGroup]);
    if (vectors == 0) continue;
    float* s = m.scores + i * kBlock;
    scale_row<E>(s, vectors, f.a.scale);
    if (!plain) scores.finish(r0 + i, s, vectors, nullptr);
    const VecF top = largest(s, vectors);
    float& maximum = m.maxima[local + i];
    if (maximum == -HUGE_VALF) {  // nothing yet
      maximum = reduce_max(top);
    } else if (any(less(set1(maximum + kSlack), top))) {
      raise_maximum(m, local + i, reduce_max(top), started);
    }
  }
  // a loop of its own: without the branches above, rows overlap in the processor
  for (int64_t i = 0; i < rows; ++i) {
    const int vectors = vectors_of(seen[i / E::kGroup]);
    if (vectors == 0) continue;
    const float* s = m.scores + i * kBlock;
    float* sums = m.sums + (local + i) * kLanes;
    const float shift = m.maxima[local + i];
    float* w = m.weights + i * weight_width;
    store(sums, plain ? weigh_plain<E>(s, shift, load(sums), w)
                      : weigh<E>(s, vectors, shift, load(sums), w));
  }
  for (int64_t i = 0; i < rows; i += E::kGroup) {
    const int n = static_cast<int>(min_of<int64_t>(E::kGroup, rows - i));
    row_group<E>(n, vectors_of(f.a.dv), words_of(seen[i / E::kGroup], E::kPer),
                 {m.weights + i * weight_width, weight_width, 1}, {m.values, m.v_width},
                 {m.o + (local + i) * m.o_width, m.o_width}, started, 1.0f);
  }
}

// Divides by the sums and writes a block's rows.
template <class T, class E>
void finish_rows(const AttentionForward& f, const ForwardMemory<E>& m, const Head& head, int64_t r0,
                 int64_t rows, int64_t local, bool started) {
  for (int64_t i = 0; i < rows; ++i) {
    const float total = reduce_add(load(m.sums + (local + i) * kLanes));
    const float* o = m.o + (local + i) * m.o_width;
    T* out = head.query_row<T>(f.out, r0 + i);
    const VecF scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
    for_vectors(f.a.dv, [&](int64_t d, auto... n) {
      store(out + d, started ? load(o + d) * scale : zero(), n...);
    });
    if (f.lse != nullptr) {
      const int64_t at = head.lse_at(r0 + i);
      const double top = m.maxima[local + i], rest = log(total);
      f.lse[at] = total == 0.0f ? -HUGE_VALF : static_cast<float>(top + rest);
      // what the rounding took off; for a row of -3e38, as masks make them, that is the logarithm
      f.lse[f.a.lse_size + at] =
          total == 0.0f ? 0.0f : static_cast<float>((top - f.lse[at]) + rest);
    }
  }
}

// Rows of fp32 are read where they lie, unless they are so far apart that they would compete for
// the same lines of the cache.
inline bool lie_well(const HeadRows& x, int64_t size, int64_t rows) {
  return x.row == size || rows <= 16;
}

// Packs one block of keys and values, and asks for the next.
template <class T, class E>
inline void pack_keys(const AttentionForward& f, ForwardMemory<E>& m, const Head& head, int64_t k0,
                      int64_t keys, int64_t end, int64_t rows) {
  const HeadRows &k = f.a.k, &v = f.a.v;
  pack_transposed<E>(head.key_row<const T>(k, k0), k.row, keys, f.a.d, m.keys);
  const T* values = head.key_row<const T>(v, k0);
  bool packed = false;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (f.a.dv % kLanes == 0 && lie_well(v, f.a.dv, rows)) {
      m.values = values;
      m.v_width = v.row;
      packed = true;
    }
  }
  if (!packed) pack_rows<E>(values, v.row, keys, f.a.dv, m.own_values, m.o_width);
  const int64_t next = k0 + kBlock;
  if (next >= end) return;
  const int64_t count = min_of(kBlock, end - next);
  prefetch_rows(head.key_row<const T>(k, next), k.row, count, f.a.d);
  prefetch_rows(head.key_row<const T>(v, next), v.row, count, f.a.dv);
}

template <class T>
void forward_task(const AttentionForward& f, int64_t task, float* scratch) {
  using E = Engine<T>;
  const Attention& a = f.a;
  const int64_t chunks = attention_query_chunks(a, f.blocks_per_task);
  const Head head(a, task / chunks);  // the last rows first: under a causal mask they see most
  const int64_t begin = (chunks - 1 - task % chunks) * f.blocks_per_task * kBlock;
  const int64_t end = min_of(head.rows, begin + f.blocks_per_task * kBlock);
  if (begin >= end) return;

  [[maybe_unused]] const typename E::Registers registers;
  ForwardMemory<E> m(f, scratch);
  bool in_place = false;
  if constexpr (sizeof(T) == sizeof(float)) {
    in_place = head.group == 1 && lie_well(a.q, a.d, end - begin);
    if (in_place) {
      m.q = head.query_row<const T>(a.q, begin);
      m.q_width = a.q.row;
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    if (!in_place) {
      pack_row<E>(head.query_row<const T>(a.q, r), a.d, m.own_q + (r - begin) * m.q_width);
    }
    const float sink = a.sinks == nullptr ? -HUGE_VALF : a.sinks[head.query_head(r)];
    m.maxima[r - begin] = sink;
    float* sums = m.sums + (r - begin) * kLanes;
    store(sums, zero());
    if (sink != -HUGE_VALF) sums[0] = 1.0f;
  }

  uint64_t started = 0;  // one bit per block of the task
  const int64_t low = head.low(begin), high = head.high(end - 1);
  for (int64_t k0 = low / kBlock * kBlock; k0 < high; k0 += kBlock) {
    const int64_t keys = min_of(kBlock, high - k0);
    bool packed = false;
    Scores scores{head, k0, keys, m.bias};
    for (int64_t r0 = begin; r0 < end; r0 += kBlock) {
      const int64_t rows = min_of(kBlock, end - r0), block = (r0 - begin) / kBlock;
      if (k0 >= head.high(r0 + rows - 1) || k0 + keys <= head.low(r0)) continue;
      const MaskEffect mask(head, k0, r0, r0 + rows);
      if (mask.most == 0) continue;
      if (!packed) pack_keys<T>(f, m, head, k0, keys, high, end - begin);
      packed = true;
      forward_block<E>(f, m, scores, mask, r0, rows, r0 - begin, (started >> block & 1) != 0);
      started |= uint64_t{1} << block;
    }
  }
  for (int64_t r0 = begin; r0 < end; r0 += kBlock) {
    const int64_t block = (r0 - begin) / kBlock;
    finish_rows<T>(f, m, head, r0, min_of(kBlock, end - r0), r0 - begin,
                   (started >> block & 1) != 0);
  }
}

int64_t forward_scratch(const AttentionForward& f) {
  return with_type(f.a.dtype,
                   [&]<class T>(const T*) { return ForwardMemory<Engine<T>>(f, nullptr).floats; });
}
void forward(const AttentionForward& f, int64_t task, float* scratch) {
  with_type(f.a.dtype, [&]<class T>(const T*) { forward_task<T>(f, task, scratch); });
}

FASTLM_EXPORT(AttentionKernels, attention) = {
    read_mask, forward_scratch, forward, backward_scratch, backward, sink_gradient,
};
