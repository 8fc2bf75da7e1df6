// The decode plan: runs the stages of a token on PyTorch's threads, entered once.
//
// A stage is cut into pieces that threads take from a counter; a thread that finds none left waits
// until the stage's items are all done. So a stage waits only for threads that run: the plan is
// right with however many of the threads it asked for, be it one, and a thread that comes late or
// is taken off its processor holds up nothing but the piece it has taken. Which thread computes a
// piece changes nothing in the result.
#include "torch/decode_plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(DecodePlanKernels, decode_plan)
FASTLM_KERNEL_TABLE(DecodeAttentionKernels, decode_attention)
FASTLM_KERNEL_TABLE(QuantizedLinearKernels, quantized_linear)

namespace fastlm {
namespace {

constexpr int64_t kStages = 6;           // of a layer
constexpr int kSpins = 4096;             // some tens of microseconds, then others may run
constexpr int64_t kShare = 32 * 1024;    // bytes of a stage's weights that are worth a thread
constexpr int64_t kPiecesPerThread = 4;  // of a stage
constexpr int64_t kNear = 24 << 20;      // bytes of weights that a last-level cache may keep

inline void relax() {
#if FASTLM_X86
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where piece p of a stage begins: the first pieces are half a thread's share, then a quarter, then
// two eighths, so that the last ones even out what the threads' speeds differ by.
int64_t piece_begin(int64_t p, int64_t items, int64_t threads) {
  constexpr int64_t kBase[] = {0, 4, 6, 7, 8}, kWidth[] = {4, 2, 1, 1, 0};
  const int64_t round = p / threads, k = p % threads;
  return items * (kBase[round] * threads + k * kWidth[round]) / (8 * threads);
}

// Works on the pieces of a stage until all of its items are done; f(begin, end, piece).
template <class F>
void share(Progress& progress, int64_t items, int64_t threads, const F& f) {
  const int64_t pieces = threads * kPiecesPerThread;
  while (progress.next.load(std::memory_order_relaxed) < pieces) {
    const int64_t p = progress.next.fetch_add(1, std::memory_order_relaxed);
    if (p >= pieces) break;
    const int64_t begin = piece_begin(p, items, threads);
    const int64_t end = piece_begin(p + 1, items, threads);
    if (begin == end) continue;
    f(begin, end, p);
    progress.done.fetch_add(end - begin, std::memory_order_acq_rel);
  }
  for (int spins = 0; progress.done.load(std::memory_order_acquire) < items; ++spins) {
    spins < kSpins ? relax() : std::this_thread::yield();
  }
}

int64_t units(int64_t outputs) { return (outputs + kPlanUnit - 1) / kPlanUnit; }

void require(bool fits) {
  if (!fits) throw std::invalid_argument("decode plan: the sizes do not fit it");
}

// Whether two products take the same operand.
bool alike(const PlanProduct& a, const PlanProduct& b) {
  return (a.scale == nullptr) == (b.scale == nullptr) && a.form == b.form && a.digits == b.digits &&
         a.transposed == b.transposed;
}

void check_range(const char* what, int64_t value, int64_t end) {
  if (value >= 0 && value < end) return;
  throw std::out_of_range(std::string("decode plan: ") + what + " must be in [0, " +
                          std::to_string(end) + "), got " + std::to_string(value));
}

}  // namespace

Buffer::Buffer(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 127) / 64 * 64;  // never zero
  data_.reset(static_cast<char*>(std::aligned_alloc(64, size)));
  if (data_ == nullptr) throw std::bad_alloc();
}
void Buffer::Free::operator()(char* p) const { std::free(p); }

DecodePlan::DecodePlan(PlanModel model) : model_(std::move(model)) {
  PlanStep& s = model_.step;
  require(s.batch >= 1 && s.batch <= kPlanMaxBatch && s.head_dim >= 1 &&
          s.head_dim <= kPlanMaxHead && s.kv_heads >= 1 && s.heads % s.kv_heads == 0 &&
          !model_.layers.empty());
  const int64_t size = s.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t stages = kStages * static_cast<int64_t>(model_.layers.size()) + 1;
  int64_t weights = 0, widest = 0;
  const auto count = [&](const PlanProduct& p) {
    if (p.w == nullptr) return;
    if (p.scale == nullptr) {
      require(p.stride >= (p.transposed ? p.out : p.in));
      weights += p.out * p.in * size;
      return;
    }
    require(p.group >= kQuantizedBlock && p.in % p.group == 0 && p.group % kQuantizedBlock == 0 &&
            (p.digits == 1 || p.digits == 3 || p.digits == 4));
    const int64_t steps = p.in / p.group * (p.minimum == nullptr ? 2 : 4);
    weights += p.out * (p.in / (p.form == QuantizedForm::kInt8 ? 1 : 2) + steps);
    quantized_bytes_ = std::max(quantized_bytes_, s.batch * quantized_row_bytes(p.in, p.digits));
  };
  count(model_.head);
  for (const PlanLayer& layer : model_.layers) {
    for (const PlanProduct* p :
         {&layer.q, &layer.k, &layer.v, &layer.out, &layer.gate, &layer.up, &layer.down}) {
      count(*p);
    }
    const PlanProduct &gate = layer.gate, &up = layer.up;
    for (const PlanProduct* p : {&layer.q, &layer.k, &layer.v}) {
      require(p->scale == nullptr || s.head_dim % kQuantizedPanel == 0);
      require(alike(*p, layer.q));  // they share their operand
    }
    require(gate.w == nullptr || alike(gate, up));
    widest = std::max(widest, up.out);
  }
  s.quantized = &quantized_linear_kernels();
  s.near = weights <= kNear;
  useful_threads_ = std::max<int64_t>(1, weights / stages / kShare);
  row_bytes_ = s.batch * s.hidden * size;
  x_ = Buffer(s.batch * s.hidden * 4);
  q_ = Buffer(s.batch * s.heads * s.head_dim * size);
  attended_ = Buffer(s.batch * s.heads * s.head_dim * size);
  hidden_ = Buffer(s.batch * widest * size);
  progress_ = std::vector<Progress>(static_cast<size_t>(stages));
  const auto batch = static_cast<size_t>(s.batch);
  lengths_.resize(batch);
  first_key_.resize(batch);
  first_task_.resize(batch + 1);

  model_.step.x = x_.as<float>();
  model_.step.q = q_.as<void>();
  DecodeAttentionArgs& a = attention_;
  a.q = q_.as<void>();
  a.out = attended_.as<void>();
  a.q_head = a.out_head = a.k_row = a.v_row = s.head_dim;
  a.q_row = a.q_batch = a.out_row = a.out_batch = s.heads * s.head_dim;
  a.batch = s.batch;
  a.heads = s.heads;
  a.kv_heads = s.kv_heads;
  a.queries = 1;
  a.head_dim = a.value_dim = s.head_dim;
  a.lengths = lengths_.data();
  a.first_key = first_key_.data();
  a.first_task = first_task_.data();
  a.window = model_.window;
  a.scale = model_.scale;
  a.dtype = s.dtype;
}

void DecodePlan::bind_cache(const std::vector<void*>& keys, const std::vector<void*>& values,
                            int64_t capacity) {
  if (keys.size() != model_.layers.size() || values.size() != model_.layers.size()) {
    throw std::invalid_argument("decode plan: the cache must have one key and value per layer");
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    model_.layers[i].keys = keys[i];
    model_.layers[i].values = values[i];
  }
  PlanStep& s = model_.step;
  s.capacity = capacity;
  attention_.k_head = attention_.v_head = capacity * s.head_dim;
  attention_.k_batch = attention_.v_batch = s.one_sequence ? 0 : s.kv_heads * capacity * s.head_dim;
}

// The tasks of the attention, alike in all layers.
void DecodePlan::cut_attention(const int64_t* first) {
  const PlanStep& s = model_.step;
  joined_ = false;
  for (size_t b = 0; b < lengths_.size(); ++b) {
    lengths_[b] = s.slots[b] + 1;
    first_key_[b] = first == nullptr ? 0 : first[b];
    if (model_.window > 0) {
      first_key_[b] = std::max<int64_t>(first_key_[b], lengths_[b] - model_.window);
    }
    const int64_t pieces = decode_pieces(lengths_[b] - first_key_[b], s.kv_heads);
    first_task_[b + 1] = first_task_[b] + s.kv_heads * pieces;
    joined_ = joined_ || pieces > 1;
  }
  if (!joined_) return;
  const int64_t floats = first_task_.back() * (s.heads / s.kv_heads) * (s.head_dim + 2);
  if (floats > partial_floats_) {
    partial_ = Buffer(8 * floats);  // twice as much as now, for the keys to come
    partial_floats_ = 2 * floats;
  }
  attention_.partial = partial_.as<float>();
}

void DecodePlan::step(const PlanTokens& given, float* logits, int64_t limit, int64_t* best) {
  PlanStep& s = model_.step;
  for (int64_t b = 0; b < s.batch; ++b) {
    check_range("a token", given.tokens[b], s.vocab);
    check_range("a position", given.positions[b], model_.places);
    check_range("a place in the cache", given.slots[b], s.capacity);
    if (given.first != nullptr) check_range("a first key", given.first[b], given.slots[b] + 1);
  }
  s.tokens = given.tokens;
  s.positions = given.positions;
  s.slots = given.slots;
  cut_attention(given.first);
  for (Progress& p : progress_) {
    p.next.store(0, std::memory_order_relaxed);
    p.done.store(0, std::memory_order_relaxed);
  }
  decode_plan_kernels().embed(s);

  const auto available = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = std::min(available, useful_threads_);
  while (static_cast<int64_t>(rows_.size()) < threads) {
    rows_.emplace_back(row_bytes_);
    quantized_.emplace_back(quantized_bytes_);
  }
  const auto pieces = static_cast<size_t>(threads * kPiecesPerThread);
  largest_.assign(pieces * static_cast<size_t>(s.batch), -INFINITY);
  at_.assign(pieces * static_cast<size_t>(s.batch), 0);
  const Head head{logits, std::min(limit, model_.head.out)};
  if (threads == 1) {
    run(0, 1, head);
  } else {
    // each call is a participant, numbered by the first index it was given
    torch::stable::parallel_for(0, threads, 1,
                                [&](int64_t begin, int64_t) { run(begin, threads, head); });
  }
  if (best == nullptr) return;
  for (int64_t b = 0; b < s.batch; ++b) {
    float most = -INFINITY;
    best[b] = 0;
    for (size_t p = 0; p < pieces; ++p) {  // in the order of the vocabulary: the first one wins
      const size_t i = p * static_cast<size_t>(s.batch) + static_cast<size_t>(b);
      if (std::isnan(largest_[i])) throw std::runtime_error("decode plan: a logit is not finite");
      if (largest_[i] > most) {
        most = largest_[i];
        best[b] = at_[i];
      }
    }
  }
}

// What a product takes for these rows of the plan's type.
const void* DecodePlan::operand(const PlanProduct& p, const void* rows, int64_t participant) const {
  if (p.scale == nullptr) return rows;
  void* to = quantized_[static_cast<size_t>(participant)].as<void>();
  const PlanStep& s = model_.step;
  s.quantized->quantize({rows, to, p.in, p.in, p.digits, p.form, s.dtype}, 0, s.batch);
  return to;
}

// What one participant does: all stages in turn, of each as many pieces as it gets.
void DecodePlan::run(int64_t participant, int64_t threads, const Head& head) {
  const PlanStep& s = model_.step;
  const DecodePlanKernels& kernels = decode_plan_kernels();
  const DecodeAttentionKernels& attention = decode_attention_kernels();
  void* normed = rows_[static_cast<size_t>(participant)].as<void>();
  Progress* stage = progress_.data();

  // A stage that is a product. Its operand is made by every participant that gets a piece, for
  // itself: a barrier would cost more. What it is made of stands still meanwhile, since the stage
  // has a piece that is not done.
  const auto product = [&](const PlanProduct& p, const PlanNorm* norm, const void* from,
                           int64_t items, const auto& work) {
    const void* rows = nullptr;
    share(*stage++, items, threads, [&](int64_t begin, int64_t end, int64_t piece) {
      if (rows == nullptr) {
        if (norm != nullptr) kernels.norm(s, *norm, normed);
        rows = operand(p, norm != nullptr ? normed : from, participant);
      }
      work(rows, begin, end, piece);
    });
  };
  const auto add = [&](const PlanProduct& p, const void* from) {
    product(p, nullptr, from, units(p.out),
            [&](const void* rows, int64_t begin, int64_t end, int64_t) {
              kernels.add(s, p, rows, begin, end);
            });
  };

  for (const PlanLayer& layer : model_.layers) {
    DecodeAttentionArgs a = attention_;
    a.k = layer.keys;
    a.v = layer.values;
    product(layer.q, &layer.attention_norm, nullptr, s.heads + 2 * s.kv_heads,
            [&](const void* rows, int64_t begin, int64_t end, int64_t) {
              kernels.project(s, layer, rows, begin, end);
            });
    share(*stage++, first_task_.back(), threads,
          [&](int64_t begin, int64_t end, int64_t) { attention.attend(a, begin, end); });
    if (joined_) {
      share(*stage++, s.batch * s.heads, threads,
            [&](int64_t begin, int64_t end, int64_t) { attention.combine(a, begin, end); });
    }
    add(layer.out, attended_.as<void>());
    product(layer.up, &layer.mlp_norm, nullptr, units(layer.up.out),
            [&](const void* rows, int64_t begin, int64_t end, int64_t) {
              kernels.hidden(s, layer, rows, hidden_.as<void>(), begin, end);
            });
    add(layer.down, hidden_.as<void>());
  }
  product(model_.head, &model_.norm, nullptr, units(model_.head.out),
          [&](const void* rows, int64_t begin, int64_t end, int64_t piece) {
            const int64_t at = piece * s.batch;
            kernels.logits(s, model_.head, rows, head.logits, head.limit, largest_.data() + at,
                           at_.data() + at, begin, end);
          });
}

}  // namespace fastlm
