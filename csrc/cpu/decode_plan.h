// decode_plan: the stages of one token for a batch of up to 16 sequences.
// Computes   embedding; norm; q, k, v with rotation and append; x += product; activated
//            projections; logits and the largest of them
// Algorithm  each product goes by panels of weight rows (cpu/gemm.h) and finishes its outputs while
//            their sums are in L1: a head is rotated and stored where it belongs, the residual
//            stream is added to in place, gate and up meet under the activation
// Tile       up to 16 rows of x by 48 weight rows; q, k and v by whole heads
// Traffic    reads each weight once; activations stay in L1 and L2
// Numerics   fp32 sums and residual stream; the operands of products are rounded to the weights'
//            type once; same bits for any number of threads
// Source     arXiv:2104.09864 for the rotation; else see the operators' kernels
#include "cpu/gemm.h"
#include "cpu/columns.h"
#include "cpu/norm.h"
#include "cpu/activation_math.h"

// Outputs of an integer weight at a time: whole panels, and sums for all rows of the batch.
constexpr int64_t kIntegerPanel = 96;
static_assert(kPlanMaxBatch * kIntegerPanel <= kBlockX * kPanel);
static_assert(kPlanMaxBatch <= kColumnsRows && kBlockX * kPanel <= kColumnsSums);

// Rows of sums, `stride` apart.
struct PanelSums {
  const float* at;
  int64_t stride;
  const float* row(int64_t b) const { return at + b * stride; }
};

// The sums of `count` rows of an integer weight from row `first`, a panel's beginning.
inline void quantized_product(const PlanStep& s, const PlanProduct& p, const void* x, int64_t first,
                              int64_t count, Sums* sums) {
  const int64_t bytes = p.in / (p.form == QuantizedForm::kInt8 ? 1 : 2);  // of a row
  const int64_t steps = first * (p.in / p.group);
  QuantizedLinearForward a{};
  a.q = x;
  a.values = static_cast<const char*>(p.w) + first * bytes;
  a.scale = static_cast<const fp16*>(p.scale) + steps;
  if (p.minimum != nullptr) a.minimum = static_cast<const fp16*>(p.minimum) + steps;
  a.y = sums->at;
  a.y_stride = kIntegerPanel;
  a.rows = s.batch;
  a.in = p.in;
  a.out = count;
  a.group = p.group;
  a.digits = p.digits;
  a.form = p.form;
  a.dtype = DType::kFloat32;
  s.quantized->forward(a, 0, (count + kQuantizedPanel - 1) / kQuantizedPanel);
}

// The sums of `one_row` for every row of x, bit for bit. A tile over all of k adds in the order of
// its streams; what `one_row` adds in another order goes row by row.
template <class T>
void rows_alone(const T* x, int64_t rows, const T* w, int64_t ldw, int64_t rows_w, int64_t k,
                Sums* sums, bool near) {
  alignas(64) float rest[kPanel];
  for (int64_t m = 0; m < rows; m += kTileX) {
    const int64_t some = min_of<int64_t>(kTileX, rows - m);
    float* to = sums->at + m * kPanel;
    const int64_t tiled = near || some == 1 ? 0 : rows_w / 8 * 8;  // 8 streams
    if (tiled > 0) panel_block(x + m * k, k, some, w, ldw, tiled, k, to, false);
    if (tiled == rows_w) continue;
    for (int64_t b = 0; b < some; ++b) {
      one_row(x + (m + b) * k, w + tiled * ldw, ldw, rows_w - tiled, k, rest, near);
      for (int64_t j = tiled; j < rows_w; ++j) to[b * kPanel + j] = rest[j - tiled];
    }
  }
}

// Outputs of a product at a time: of a weight that lies transposed, as many as there is room for.
inline int64_t panel_of(const PlanStep& s, const PlanProduct& p) {
  if (p.transposed) return kBlockX * kPanel / s.batch / kLanes * kLanes;
  return p.scale != nullptr ? kIntegerPanel : kPanel;
}

// Calls f(first, count, sums) for weight rows [first, first + count) until all of [begin, end) are
// done.
template <class T, class F>
inline void for_panels(const PlanStep& s, const PlanProduct& p, const void* x, int64_t begin,
                       int64_t end, Sums* sums, F&& f) {
  const int64_t panel = panel_of(s, p);
  const T* rows = static_cast<const T*>(x);
  for (int64_t n = begin; n < end; n += panel) {
    const int64_t count = min_of<int64_t>(panel, end - n);
    const T* w = static_cast<const T*>(p.w) + n * (p.transposed ? 1 : p.stride);
    if (p.scale != nullptr) {
      quantized_product(s, p, x, n, count, sums);
    } else if (p.transposed) {
      columns_product(rows, s.batch, w, p.stride, count, p.in, sums->at);
    } else if (s.one_sequence) {
      rows_alone(rows, s.batch, w, p.stride, count, p.in, sums, s.near);
    } else {
      panel_product(rows, s.batch, w, p.stride, count, p.in, sums, s.near);
    }
    f(n, count, PanelSums{sums->at, p.transposed ? count : panel});
  }
}

template <class T>
void embed_rows(const PlanStep& s) {
  for (int64_t b = 0; b < s.batch; ++b) {
    const T* row = static_cast<const T*>(s.embed) + s.tokens[b] * s.hidden;
    const T* place = static_cast<const T*>(s.learned);
    if (place != nullptr) place += s.positions[b] * s.hidden;
    each_vector(s.hidden, [&](int64_t i, auto... n) {
      const VecF v = load(row + i, n...);
      store(s.x + b * s.hidden + i, place == nullptr ? v : v + load(place + i, n...), n...);
    });
  }
}

template <bool kCentred, class T>
void norm_rows(const PlanStep& s, const PlanNorm& norm, T* to) {
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  for (int64_t b = 0; b < s.batch; ++b) {
    const float* x = s.x + b * s.hidden;
    const RowStats stats = forward_stats<kCentred>(x, s.hidden, s.eps);
    const VecF near = set1(stats.near), shift = set1(stats.shift), rstd = set1(stats.rstd);
    for_vectors(s.hidden, [&](int64_t i, auto... n) {
      const VecF h = normalised<kCentred>(x, near, shift, rstd, i, n...),
                 w = load(weight + i, n...);
      const VecF v = kCentred && bias != nullptr ? fma(h, w, load(bias + i, n...)) : h * w;
      store(to + b * s.hidden + i, v, n...);
    });
  }
}

// y = the head x, rotated where there are tables.
template <class T>
inline void put_head(const PlanStep& s, const float* x, int64_t position, bool rotate, T* y) {
  if (!rotate) {
    each_vector(s.head_dim, [&](int64_t i, auto... n) { store(y + i, load(x + i, n...), n...); });
    return;
  }
  const int64_t half = s.head_dim / 2;
  const float *cos = s.cos + position * half, *sin = s.sin + position * half;
  each_vector(half, [&](int64_t i, auto... n) {
    const VecF x1 = load(x + i, n...), x2 = load(x + half + i, n...);
    const VecF c = load(cos + i, n...), d = load(sin + i, n...);
    store(y + i, fma(zero() - x2, d, x1 * c), n...);
    store(y + half + i, fma(x1, d, x2 * c), n...);
  });
}

template <class T>
void project_heads(const PlanStep& s, const PlanLayer& layer, const void* rows, int64_t begin,
                   int64_t end) {
  Sums sums;
  alignas(64) float heads[kPlanMaxBatch * kPlanMaxHead];
  const int64_t size = s.head_dim;
  for (int64_t h = begin; h < end; ++h) {
    const bool is_q = h < s.heads, is_k = !is_q && h < s.heads + s.kv_heads;
    const int64_t head = h - (is_q ? 0 : is_k ? s.heads : s.heads + s.kv_heads);
    const PlanProduct& p = is_q ? layer.q : is_k ? layer.k : layer.v;
    const T* bias = static_cast<const T*>(p.bias);
    const int64_t top = head * size;
    for_panels<T>(
        s, p, rows, top, top + size, &sums, [&](int64_t first, int64_t count, PanelSums done) {
          for (int64_t b = 0; b < s.batch; ++b) {
            float* to = heads + b * kPlanMaxHead + first - top;
            each_vector(count, [&](int64_t i, auto... n) {
              store(to + i, biased(done.row(b), bias ? bias + first : nullptr, i, n...), n...);
            });
          }
        });
    for (int64_t b = 0; b < s.batch; ++b) {
      T* to;
      if (is_q) {
        to = static_cast<T*>(s.q) + (b * s.heads + head) * size;
      } else {
        to = static_cast<T*>(is_k ? layer.keys : layer.values);
        const int64_t sequence = s.one_sequence ? 0 : b;
        to += ((sequence * s.kv_heads + head) * s.capacity + s.slots[b]) * size;
      }
      put_head(s, heads + b * kPlanMaxHead, s.positions[b], s.cos && (is_q || is_k), to);
    }
  }
}

template <class T>
void add_units(const PlanStep& s, const PlanProduct& p, const void* rows, int64_t begin,
               int64_t end) {
  Sums sums;
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t last = min_of<int64_t>(end * kPlanUnit, p.out);
  for_panels<T>(s, p, rows, begin * kPlanUnit, last, &sums,
                [&](int64_t first, int64_t count, PanelSums done) {
                  for (int64_t b = 0; b < s.batch; ++b) {
                    float* x = s.x + b * s.hidden + first;
                    each_vector(count, [&](int64_t i, auto... n) {
                      const VecF y = biased(done.row(b), bias ? bias + first : nullptr, i, n...);
                      store(x + i, load(x + i, n...) + y, n...);
                    });
                  }
                });
}

template <Activation kAct, class T>
void hidden_units(const PlanStep& s, const PlanLayer& layer, const void* rows, T* to, int64_t begin,
                  int64_t end) {
  Sums up, gate;
  const PlanProduct &u = layer.up, &g = layer.gate;
  const T *b_up = static_cast<const T*>(u.bias), *b_gate = static_cast<const T*>(g.bias);
  const int64_t last = min_of<int64_t>(end * kPlanUnit, u.out);
  const auto finish = [&](int64_t first, int64_t count, PanelSums ups, PanelSums gates) {
    for (int64_t b = 0; b < s.batch; ++b) {
      T* row = to + b * u.out + first;
      each_vector(count, [&](int64_t i, auto... n) {
        const VecF v = biased(ups.row(b), b_up ? b_up + first : nullptr, i, n...);
        if (g.w == nullptr) return store(row + i, activate<kAct>(v), n...);
        const VecF w = biased(gates.row(b), b_gate ? b_gate + first : nullptr, i, n...);
        store(row + i, activate<kAct>(w) * v, n...);
      });
    }
  };
  for_panels<T>(
      s, u, rows, begin * kPlanUnit, last, &up, [&](int64_t first, int64_t count, PanelSums done) {
        if (g.w == nullptr) return finish(first, count, done, done);
        for_panels<T>(
            s, g, rows, first, first + count, &gate,
            [&](int64_t, int64_t, PanelSums gates) { finish(first, count, done, gates); });
      });
}

template <class T>
void logits_units(const PlanStep& s, const PlanProduct& p, const void* rows, float* to,
                  int64_t limit, float* largest, int64_t* at, int64_t begin, int64_t end) {
  Sums sums;
  for (int64_t b = 0; b < s.batch; ++b) {
    largest[b] = -INFINITY;
    at[b] = p.out;
  }
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t last = min_of<int64_t>(end * kPlanUnit, p.out);
  for_panels<T>(
      s, p, rows, begin * kPlanUnit, last, &sums,
      [&](int64_t first, int64_t count, PanelSums done) {
        for (int64_t b = 0; b < s.batch; ++b) {
          float* y = to + b * p.out + first;
          each_vector(count, [&](int64_t i, auto... n) {
            store(y + i, biased(done.row(b), bias ? bias + first : nullptr, i, n...), n...);
          });
          const int64_t seen = min_of(count, limit - first);
          VecF top = set1(largest[b]), wrong = zero();  // wrong: NaN where a logit is not finite
          int64_t i = 0;
          for (; i + kLanes <= seen; i += kLanes) {
            const VecF v = load(y + i);
            top = vmax(top, v);
            wrong = fma(v, zero(), wrong);
          }
          if (i < seen) {
            const VecF v = load(y + i, static_cast<int>(seen - i));
            top = vmax(top, select(below(i, seen), v, top));
            wrong = fma(v, zero(), wrong);
          }
          const float most = reduce_max(top);
          if (!(reduce_add(wrong) == 0.0f)) largest[b] = NAN;
          if (!(most > largest[b])) continue;
          largest[b] = most;
          at[b] = first;
          while (y[at[b] - first] != most) ++at[b];
        }
      });
}

// f(a value of the plan's type)
template <class F>
inline void typed(const PlanStep& s, F&& f) {
  if (s.dtype == DType::kFloat32) return f(0.0f);
  if (s.dtype == DType::kBFloat16) return f(bf16{});
  f(fp16{});
}

void embed(const PlanStep& s) {
  typed(s, [&](auto type) { embed_rows<decltype(type)>(s); });
}
void norm(const PlanStep& s, const PlanNorm& n, void* to) {
  typed(s, [&](auto type) {
    auto* y = static_cast<decltype(type)*>(to);
    s.centred ? norm_rows<true>(s, n, y) : norm_rows<false>(s, n, y);
  });
}
void project(const PlanStep& s, const PlanLayer& layer, const void* rows, int64_t begin,
             int64_t end) {
  typed(s, [&](auto type) { project_heads<decltype(type)>(s, layer, rows, begin, end); });
}
void add(const PlanStep& s, const PlanProduct& p, const void* rows, int64_t begin, int64_t end) {
  typed(s, [&](auto type) { add_units<decltype(type)>(s, p, rows, begin, end); });
}
template <Activation kAct>
void hidden_of(const PlanStep& s, const PlanLayer& layer, const void* rows, void* to, int64_t begin,
               int64_t end) {
  typed(s, [&](auto type) {
    hidden_units<kAct>(s, layer, rows, static_cast<decltype(type)*>(to), begin, end);
  });
}
void hidden(const PlanStep& s, const PlanLayer& layer, const void* rows, void* to, int64_t begin,
            int64_t end) {
  switch (s.act) {
    case Activation::kSilu:
      return hidden_of<Activation::kSilu>(s, layer, rows, to, begin, end);
    case Activation::kGelu:
      return hidden_of<Activation::kGelu>(s, layer, rows, to, begin, end);
    case Activation::kGeluTanh:
      return hidden_of<Activation::kGeluTanh>(s, layer, rows, to, begin, end);
    case Activation::kRelu:
      return hidden_of<Activation::kRelu>(s, layer, rows, to, begin, end);
    case Activation::kRelu2:
      return hidden_of<Activation::kRelu2>(s, layer, rows, to, begin, end);
  }
}
void logits(const PlanStep& s, const PlanProduct& p, const void* rows, float* to, int64_t limit,
            float* largest, int64_t* at, int64_t begin, int64_t end) {
  typed(s, [&](auto type) {
    logits_units<decltype(type)>(s, p, rows, to, limit, largest, at, begin, end);
  });
}

FASTLM_EXPORT(DecodePlanKernels, decode_plan) = {embed, norm, project, add, hidden, logits};
