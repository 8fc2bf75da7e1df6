// attention backward.
// Computes   p = exp(s - lse), ds = p (grad v^T - delta), delta = rowsum(grad out) - grad_lse;
//            dv = p^T grad, dk = scale ds^T q, dq = scale ds k
// Algorithm  key blocks outermost, query blocks inside: p and ds of a 64 x 64 block are made again
//            from q, k, v and lse, then feed three products. A task owns one kv head and adds dq
//            up in fp32; when there are fewer heads than threads, tasks for chunks of key blocks
//            make dk and dv and others for chunks of query blocks make dq, adding the same blocks
//            in the same order
// Tile       64 queries x 64 keys; blocks outside all sight, by position or by the mask, are
//            skipped, and so is the half of a diagonal block that is masked
// Traffic    q, grad, out, k, v once; dq stays in cache or passes it once per key block
// Numerics   as forward; bf16 p and ds are rounded to bf16 before the products, sums are fp32; same
//            bits for any threads and for both kinds of task
// Source     arXiv:2307.08691, algorithm 2
template <class E>
struct BackwardMemory {
  int64_t q_width, g_width, d_width, v_width;
  float *q, *g, *q_right, *g_right, *lse, *low, *delta, *dq;  // of the task's rows
  float *keys, *values, *key_rows, *dk, *dv;                  // of one key block
  float *s, *ds, *p_columns, *ds_columns, *ds_rows, *bias;    // of one block of scores
  float* slope;
  float* turned;  // what turn_columns needs, where sums lie across
  int64_t floats;

  BackwardMemory(const Attention& a, int64_t rows, float* base) {
    Arena arena{base};
    q_width = padded(words_of(a.d, E::kPer));
    g_width = padded(words_of(a.dv, E::kPer));
    d_width = padded(a.d);
    v_width = padded(a.dv);
    q = arena.take(rows * q_width);
    g = arena.take(rows * g_width);
    q_right = E::kPer == 1 ? q : arena.take(rows / E::kPer * d_width);
    g_right = E::kPer == 1 ? g : arena.take(rows / E::kPer * v_width);
    lse = arena.take(rows);
    low = arena.take(rows);
    delta = arena.take(rows);
    dq = arena.take(rows * d_width);
    keys = arena.take(steps_of<E>(a.d) * kBlock);
    values = arena.take(steps_of<E>(a.dv) * kBlock);
    key_rows = arena.take(kBlock / E::kPer * d_width);
    dk = arena.take(kBlock * d_width);
    dv = arena.take(kBlock * v_width);
    s = arena.take(kBlock * kBlock);
    ds = arena.take(kBlock * kBlock);
    p_columns = E::kPer == 1 ? s : arena.take(kBlock * kBlock / E::kPer);
    ds_columns = E::kPer == 1 ? ds : arena.take(kBlock * kBlock / E::kPer);
    ds_rows = E::kPer == 1 ? ds : arena.take(kBlock * kBlock / E::kPer);
    bias = arena.take(kBlock);
    slope = arena.take(kBlock * E::kPer);
    turned = E::kUnit == 1 ? nullptr : arena.take(kBlock * max_of(d_width, v_width));
    floats = arena.used;
  }
};

// grad . out - grad_lse of the row at this place of the log-sum-exps.
template <class T>
inline float row_delta(const AttentionBackward& f, const T* grad, const T* out, int64_t at) {
  VecF dots = zero();
  for_vectors(f.a.dv, [&](int64_t d, auto... n) {
    dots = fma(load(grad + d, n...), load(out + d, n...), dots);
  });
  return reduce_add(dots) - (f.grad_lse == nullptr ? 0.0f : f.grad_lse[at]);
}

// Up to kBlock rows as the left operand of a sum over rows: [n][pairs of rows], in whole steps.
template <class Row>
inline void pack_columns(const Row& row, int64_t rows, int64_t n, float* dst) {
  constexpr int64_t kWidth = kBlock / 2;
  for (int64_t w = 0; w < words_of(rows, 2); w += kLanes) {
    for (int64_t d = 0; d < n; d += kLanes) {
      const int left = static_cast<int>(min_of<int64_t>(kLanes, n - d));
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = 2 * (w + i);
        square[i] = r + 1 < rows ? as_float(load_pairs(row(r) + d, row(r + 1) + d, left))
                    : r < rows   ? as_float(pair_up(load(row(r) + d, left), zero()))
                                 : zero();
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(dst + (d + i) * kWidth + w, square[i]);
    }
  }
}

// The rows [begin, end) of a head as operands, with what their softmax needs.
template <class T, class E>
void pack_queries(const AttentionBackward& f, const BackwardMemory<E>& m, const Head& head,
                  int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = r - begin;
    const T *q = head.query_row<const T>(f.a.q, r), *g = head.query_row<const T>(f.grad, r);
    const T* out = head.query_row<const T>(f.out, r);
    pack_row<E>(q, f.a.d, m.q + i * m.q_width);
    pack_row<E>(g, f.a.dv, m.g + i * m.g_width);
    if constexpr (E::kPer == 2 && E::kUnit == 1) {
      if (i % 2 == 0) {
        const bool whole = r + 1 < end;
        pack_pair(q, whole ? head.query_row<const T>(f.a.q, r + 1) : nullptr, f.a.d,
                  m.q_right + i / 2 * m.d_width);
        pack_pair(g, whole ? head.query_row<const T>(f.grad, r + 1) : nullptr, f.a.dv,
                  m.g_right + i / 2 * m.v_width);
      }
    }
    const int64_t at = head.lse_at(r);
    m.delta[i] = row_delta(f, g, out, at);
    m.low[i] = f.lse[f.a.lse_size + at];
    m.lse[i] = f.lse[at] == -HUGE_VALF ? HUGE_VALF : f.lse[at];  // no key seen: weights are zero
  }
  if constexpr (E::kUnit > 1) {
    for (int64_t r = begin; r < end; r += kBlock) {
      const int64_t rows = min_of(kBlock, end - r), word = (r - begin) / E::kPer;
      const auto query = [&](int64_t i) { return head.query_row<const T>(f.a.q, r + i); };
      const auto grad = [&](int64_t i) { return head.query_row<const T>(f.grad, r + i); };
      pack_columns(query, rows, f.a.d, m.q_right + word * m.d_width);
      pack_columns(grad, rows, f.a.dv, m.g_right + word * m.v_width);
    }
  }
}

// dst [n, columns] += or = a b, for a of n rows, whole steps of pairs of query rows.
template <class E>
inline void add_columns(int64_t n, int64_t keys, int64_t rows, const float* a, const float* b,
                        float* dst, bool add) {
  constexpr int64_t kWidth = kBlock / E::kPer;
  for (int64_t j = 0; j < n; j += E::kGroup) {
    row_group<E>(static_cast<int>(min_of<int64_t>(E::kGroup, n - j)), vectors_of(keys),
                 words_of(rows, E::kPer), {a + j * kWidth, kWidth, 1}, {b, kBlock},
                 {dst + j * kBlock, kBlock}, add, 1.0f);
  }
}

// p and ds of kPer neighbouring rows (both stored as the three products read them).
template <class E>
void backward_rows(const AttentionBackward& f, const BackwardMemory<E>& m, Scores& scores,
                   int64_t r0, int64_t i, int64_t rows, int64_t local, int vectors, bool plain) {
  const int count = static_cast<int>(min_of<int64_t>(E::kPer, rows - i));
  const bool capped = f.a.softcap != 0.0f;
  for (int c = 0; c < count; ++c) scale_row<E>(m.s + (i + c) * kBlock, vectors, f.a.scale);
  if (!plain) {
    for (int c = 0; c < count; ++c) {
      scores.finish(r0 + i + c, m.s + (i + c) * kBlock, vectors, m.slope + c * kBlock);
    }
  }
  VecF lse[E::kPer], low[E::kPer], delta[E::kPer];
  for (int c = 0; c < count; ++c) {
    lse[c] = set1(m.lse[local + i + c]);
    low[c] = set1(m.low[local + i + c]);
    delta[c] = set1(m.delta[local + i + c]);
  }
  for (int j = 0; j < kBlock; j += kLanes) {
    VecF p[E::kPer], ds[E::kPer];
    for (int c = 0; c < E::kPer; ++c) p[c] = ds[c] = zero();
    if (j < vectors * kLanes) {
      for (int c = 0; c < count; ++c) {
        VecF x = load(m.s + (i + c) * kBlock + j) - lse[c];
        x = x - low[c];  // a lse of 4 has lost 2e-7, more than exp loses
        p[c] = vexp_falling<E::kDegree>(x);
        ds[c] = p[c] * (load(m.ds + (i + c) * kBlock + j) - delta[c]);
        if (capped) ds[c] = ds[c] * load(m.slope + c * kBlock + j);
      }
    }
    if constexpr (E::kPer == 1) {
      store(m.s + i * kBlock + j, p[0]);
      store(m.ds + i * kBlock + j, ds[0]);
    } else {
      store(m.p_columns + i / 2 * kBlock + j, as_float(pair_up(p[0], p[1])));
      store(m.ds_columns + i / 2 * kBlock + j, as_float(pair_up(ds[0], ds[1])));
      for (int c = 0; c < count; ++c) {
        store(reinterpret_cast<bf16*>(m.ds_rows + (i + c) * (kBlock / 2)) + j, ds[c]);
      }
    }
  }
}

// One block of queries against one block of keys; `local` is its first row in the task's memory.
template <class E>
void backward_block(const AttentionBackward& f, const BackwardMemory<E>& m, Scores& scores,
                    const MaskEffect& mask, int64_t r0, int64_t rows, int64_t local, bool want_keys,
                    bool started, bool want_queries) {
  const Head& head = scores.head;
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
                 {m.s + i * kBlock, kBlock}, false, f.a.scale);
    row_group<E>(n, vectors_of(keys), words_of(f.a.dv, E::kPer),
                 {m.g + (local + i) * m.g_width, m.g_width, 1}, {m.values, kBlock},
                 {m.ds + i * kBlock, kBlock}, false, 1.0f);
  }
  for (int64_t i = 0; i < rows; i += E::kPer) {
    backward_rows<E>(f, m, scores, r0, i, rows, local, vectors_of(seen[i / E::kGroup]), plain);
  }
  if constexpr (E::kUnit > 1) {
    for (int64_t w = words_of(rows, E::kPer); w < steps_of<E>(rows); ++w) {
      for (int64_t j = 0; j < kBlock; j += kLanes) {
        store(m.p_columns + w * kBlock + j, zero());
        store(m.ds_columns + w * kBlock + j, zero());
      }
    }
    if (want_keys) {
      const int64_t word = local / E::kPer;
      add_columns<E>(f.a.dv, scores.keys, rows, m.g_right + word * m.v_width, m.p_columns, m.dv,
                     started);
      add_columns<E>(f.a.d, scores.keys, rows, m.q_right + word * m.d_width, m.ds_columns, m.dk,
                     started);
    }
  }
  for (int64_t j = 0; E::kUnit == 1 && want_keys && j < scores.keys; j += kTileRows) {
    const int n = static_cast<int>(min_of<int64_t>(kTileRows, scores.keys - j));
    const int64_t first = min_of(rows, max_of<int64_t>(0, head.first_row(scores.k0 + j) - r0));
    const int64_t from = first / E::kPer, steps = words_of(rows, E::kPer) - from;
    const int64_t word = local / E::kPer + from;
    row_group<E, E::kSumChain>(n, vectors_of(f.a.dv), steps,
                               {m.p_columns + from * kBlock + j, 1, kBlock},
                               {m.g_right + word * m.v_width, m.v_width},
                               {m.dv + j * m.v_width, m.v_width}, started, 1.0f);
    row_group<E, E::kSumChain>(n, vectors_of(f.a.d), steps,
                               {m.ds_columns + from * kBlock + j, 1, kBlock},
                               {m.q_right + word * m.d_width, m.d_width},
                               {m.dk + j * m.d_width, m.d_width}, started, 1.0f);
  }
  constexpr int64_t kWidth = kBlock / E::kPer;
  for (int64_t i = 0; want_queries && i < rows; i += E::kGroup) {
    const int n = static_cast<int>(min_of<int64_t>(E::kGroup, rows - i));
    row_group<E, E::kSumChain>(n, vectors_of(f.a.d), words_of(seen[i / E::kGroup], E::kPer),
                               {m.ds_rows + i * kWidth, kWidth, 1}, {m.key_rows, m.d_width},
                               {m.dq + (local + i) * m.d_width, m.d_width}, true, 1.0f);
  }
}

template <class T>
inline void write_row(const float* sums, int64_t n, float scale, bool written, T* dst) {
  for_vectors(n, [&](int64_t i, auto... lanes) {
    store(dst + i, written ? load(sums + i) * set1(scale) : zero(), lanes...);
  });
}

// sums [n, kBlock] to [kBlock, width] in place, with room for as much.
inline void turn_columns(float* sums, int64_t n, float* room, int64_t width) {
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    for (int64_t d = 0; d < n; d += kLanes) {
      VecF square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load(sums + (d + i) * kBlock + j);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(room + (j + i) * width + d, square[i]);
    }
  }
  memcpy(sums, room, sizeof(float) * static_cast<size_t>(kBlock * width));
}

// dk, dv of the keys [key_begin, key_end) and dq of the rows [begin, end), as wanted.
template <class T>
void backward_range(const AttentionBackward& f, const Head& head, int64_t begin, int64_t end,
                    int64_t key_begin, int64_t key_end, bool want_keys, bool want_queries,
                    const BackwardMemory<Engine<T>>& m) {
  using E = Engine<T>;
  const Attention& a = f.a;
  pack_queries<T>(f, m, head, begin, end);
  if (want_queries) {
    memset(m.dq, 0, sizeof(float) * static_cast<size_t>((end - begin) * m.d_width));
  }
  for (int64_t k0 = key_begin; k0 < key_end; k0 += kBlock) {
    const int64_t keys = min_of(kBlock, key_end - k0);
    Scores scores{head, k0, keys, m.bias};
    bool started = false;
    for (int64_t r0 = begin; r0 < end; r0 += kBlock) {
      const int64_t rows = min_of(kBlock, end - r0);
      if (k0 >= head.high(r0 + rows - 1) || k0 + keys <= head.low(r0)) continue;
      const MaskEffect mask(head, k0, r0, r0 + rows);
      if (mask.most == 0) continue;
      if (!started) {
        pack_transposed<E>(head.key_row<const T>(a.k, k0), a.k.row, keys, a.d, m.keys);
        pack_transposed<E>(head.key_row<const T>(a.v, k0), a.v.row, keys, a.dv, m.values);
        if (want_queries) {
          pack_rows<E>(head.key_row<const T>(a.k, k0), a.k.row, keys, a.d, m.key_rows, m.d_width);
        }
      }
      backward_block<E>(f, m, scores, mask, r0, rows, r0 - begin, want_keys, started, want_queries);
      started = true;
    }
    if constexpr (E::kUnit > 1) {  // the sums lie across
      if (want_keys && started) {
        turn_columns(m.dk, a.d, m.turned, m.d_width);
        turn_columns(m.dv, a.dv, m.turned, m.v_width);
      }
    }
    for (int64_t j = 0; want_keys && j < keys; ++j) {
      write_row(m.dk + j * m.d_width, a.d, a.scale, started, head.key_row<T>(f.dk, k0 + j));
      write_row(m.dv + j * m.v_width, a.dv, 1.0f, started, head.key_row<T>(f.dv, k0 + j));
    }
  }
  for (int64_t r = begin; want_queries && r < end; ++r) {
    write_row(m.dq + (r - begin) * m.d_width, a.d, a.scale, true, head.query_row<T>(f.dq, r));
  }
}

// Rows a task of this call may hold.
inline int64_t backward_capacity(const AttentionBackward& f) {
  return kBlock * attention_blocks(f.a.tq * (f.a.heads / f.a.kv_heads));
}

template <class T>
void backward_task(const AttentionBackward& f, int64_t task, float* scratch) {
  [[maybe_unused]] const typename Engine<T>::Registers registers;
  const BackwardMemory<Engine<T>> m(f.a, backward_capacity(f), scratch);
  const int64_t heads = f.a.batch * f.a.kv_heads, step = f.blocks_per_task * kBlock;
  const Head head(f.a, task % heads);
  if (!f.split) {
    backward_range<T>(f, head, 0, head.rows, 0, head.tk, true, true, m);
    return;
  }
  const int64_t key_chunks = attention_key_chunks(f.a, f.blocks_per_task);
  int64_t chunk = task / heads;
  if (chunk < key_chunks) {
    const int64_t key_begin = chunk * step, key_end = min_of(head.tk, key_begin + step);
    if (key_begin >= key_end) return;
    const int64_t begin = head.first_row(key_begin) / kBlock * kBlock;
    const int64_t end = min_of(head.rows, kBlock * attention_blocks(head.last_row(key_end - 1)));
    backward_range<T>(f, head, begin, max_of(begin, end), key_begin, key_end, true, false, m);
    return;
  }
  chunk -= key_chunks;
  const int64_t last = attention_query_chunks(f.a, f.blocks_per_task) - 1;
  const int64_t begin = (last - chunk) * step, end = min_of(head.rows, begin + step);
  if (begin >= end) return;
  const int64_t low = head.low(begin) / kBlock * kBlock, high = head.high(end - 1);
  backward_range<T>(f, head, begin, end, low, high, false, true, m);
}

int64_t backward_scratch(const AttentionBackward& f) {
  return with_type(f.a.dtype, [&]<class T>(const T*) {
    return BackwardMemory<Engine<T>>(f.a, backward_capacity(f), nullptr).floats;
  });
}
void backward(const AttentionBackward& f, int64_t task, float* scratch) {
  with_type(f.a.dtype, [&]<class T>(const T*) { backward_task<T>(f, task, scratch); });
}

// The gradients of the sinks of the heads [begin, end) of batch x heads: - sum_i p_i delta_i with
// p_i = e^(sink - lse_i). Rows of either sign nearly cancel, hence sums in double precision.
void sink_gradient(const AttentionBackward& f, int64_t begin, int64_t end, double* gradients) {
  const Attention& a = f.a;  // of as many kv heads as heads
  for (int64_t i = begin; i < end; ++i) {
    const Head head(a, i);
    const double sink = a.sinks[i % a.heads];
    double sum = 0.0;
    for (int64_t r = 0; r < head.rows && sink != -HUGE_VAL; ++r) {
      const int64_t at = head.lse_at(r);
      const double lse = static_cast<double>(f.lse[at]) + f.lse[a.lse_size + at];
      const float delta = with_type(a.dtype, [&]<class T>(const T*) {
        return row_delta(f, head.query_row<const T>(f.grad, r), head.query_row<const T>(f.out, r),
                         at);
      });
      sum -= exp(sink - lse) * delta;
    }
    gradients[i] = sum;
  }
}
