// Binding of attention: describes the call, allocates, hands tasks to threads, registers the CPU
// kernels.
#include "ops/attention.h"

#include <atomic>
#include <tuple>

#include "torch/alloc.h"
#include "cpu/isa.h"

FASTLM_KERNEL_TABLE(AttentionKernels, attention)

namespace fastlm {
namespace {

// The last dimension must be dense; the others may have any strides.
Tensor unit_rows(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

// [B, H, T, D], or packed [total, H, D] with batch stride 0.
HeadRows head_rows(const Tensor& t) {
  void* data = const_cast<void*>(t.const_data_ptr());
  if (t.dim() == 3) return {data, 0, t.stride(1), t.stride(0)};
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

// A fresh [B, H, T, D]; with `rows_first` in the memory of a [B, T, H, D], which makes the
// transposition before an output projection free. Packed [total, H, D] are plain.
Tensor empty_heads(const Tensor& like, int64_t size, bool rows_first) {
  if (like.dim() == 3) return empty_cpu({like.size(0), like.size(1), size}, like.scalar_type());
  const int64_t b = like.size(0), h = like.size(1), t = like.size(2);
  if (!rows_first) return empty_cpu({b, h, t, size}, like.scalar_type());
  const auto some = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t sizes[] = {b, h, t, size};
  const int64_t strides[] = {some(t) * some(h) * some(size), some(size), some(h) * some(size), 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides,
                                                  static_cast<int32_t>(like.scalar_type()),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
Tensor empty_gradient(const Tensor& x) {
  return empty_heads(x, x.size(-1), x.dim() == 4 && x.stride(1) < x.stride(2));
}

void set_mask(Attention& a, const Tensor& mask) {
  a.mask = mask.const_data_ptr();
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
      a.mask_kind = MaskKind::kBool;
      break;
    case ScalarType::Float:
      a.mask_kind = MaskKind::kFloat32;
      break;
    case ScalarType::BFloat16:
      a.mask_kind = MaskKind::kBFloat16;
      break;
    case ScalarType::Half:
      a.mask_kind = MaskKind::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, "attention: expected a mask of bool, float32, bfloat16 or float16");
  }
  int64_t* strides[] = {&a.mask_batch, &a.mask_head, &a.mask_row, &a.mask_key};
  const int64_t dims = mask.dim();
  for (int64_t d = 0; d < dims; ++d) {  // missing and single dimensions keep stride 0
    if (mask.size(d) != 1) *strides[4 - dims + d] = mask.stride(d);
  }
}

// Reads the mask once for all heads and blocks of a call; the bytes live as long as the result.
std::optional<Tensor> read_mask(Attention& a) {
  if (a.mask == nullptr || a.tk == 0) return std::nullopt;
  const int64_t rows = a.mask_row == 0 ? 1 : a.tq, heads = a.mask_head == 0 ? 1 : a.heads;
  const int64_t batch = a.mask_batch == 0 ? 1 : a.batch, blocks = attention_blocks(a.tk);
  Tensor bytes = empty_cpu({batch, heads, blocks, rows}, ScalarType::Byte);
  a.mask_blocks = static_cast<uint8_t*>(bytes.mutable_data_ptr());
  a.mask_blocks_row = a.mask_row == 0 ? 0 : 1;
  a.mask_blocks_key = rows;
  a.mask_blocks_head = a.mask_head == 0 ? 0 : rows * blocks;
  a.mask_blocks_batch = a.mask_batch == 0 ? 0 : rows * blocks * heads;
  const AttentionKernels& kernels = attention_kernels();
  parallel_rows(batch * heads * rows, a.tk * (a.mask_kind == MaskKind::kFloat32 ? 4 : 2),
                [&](int64_t begin, int64_t end) { kernels.read_mask(a, begin, end); });
  return bytes;
}

// cu_seqlens as the kernel reads them; returns the longest sequence.
int64_t set_starts(const std::optional<Tensor>& starts, int64_t total, const int32_t*& out) {
  STD_TORCH_CHECK(starts->scalar_type() == ScalarType::Int && starts->is_contiguous(),
                  "attention: expected contiguous int32 cu_seqlens");
  out = static_cast<const int32_t*>(starts->const_data_ptr());
  const int64_t n = starts->numel();
  int64_t longest = 0;
  for (int64_t i = 1; i < n; ++i) {
    STD_TORCH_CHECK(out[i - 1] <= out[i], "attention: cu_seqlens must not fall");
    longest = std::max<int64_t>(longest, out[i] - out[i - 1]);
  }
  STD_TORCH_CHECK(out[0] == 0 && out[n - 1] == total,
                  "attention: cu_seqlens must run from 0 to the number of rows");
  return longest;
}

// Query blocks that share one packing of the keys; their fp32 sums stay in the second-level cache.
constexpr int64_t kForwardBlocks = 8;
constexpr int64_t kBackwardBlocks = 4;

struct Options {
  const std::optional<Tensor>&mask, &slopes, &sinks, &starts_q, &starts_k;
  bool causal;
  int64_t window;
  double scale, softcap;
};

// What would make a kernel read the wrong memory; the caller says which argument it was.
void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t dims = q.dim();
  STD_TORCH_CHECK((dims == 3 || dims == 4) && k.dim() == dims && v.dim() == dims && k.is_cpu() &&
                      v.is_cpu() && k.scalar_type() == q.scalar_type() &&
                      v.scalar_type() == q.scalar_type(),
                  "q, k and v do not fit");
  bool same = q.size(-1) > 0 && q.size(-1) == k.size(-1) && k.size(1) > 0 &&
              q.size(1) % k.size(1) == 0 && (dims == 3 || q.size(0) == k.size(0));
  for (int64_t d = 0; d + 1 < dims; ++d) same &= k.size(d) == v.size(d);
  STD_TORCH_CHECK(same, "q, k and v do not fit");
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  Attention a{};
  const bool packed = o.starts_q.has_value();
  a.q = head_rows(q);
  a.k = head_rows(k);
  a.v = head_rows(v);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.d = q.size(-1);
  a.dv = v.size(-1);
  if (packed) {
    a.batch = o.starts_q->numel() - 1;
    a.tq = set_starts(o.starts_q, q.size(0), a.starts_q);
    a.tk = set_starts(o.starts_k.has_value() ? o.starts_k : o.starts_q, k.size(0), a.starts_k);
    a.lse_head = q.size(0);
    a.lse_size = a.lse_head * a.heads;
  } else {
    a.batch = q.size(0);
    a.tq = q.size(2);
    a.tk = k.size(2);
    a.lse_head = a.tq;
    a.lse_batch = a.heads * a.tq;
    a.lse_size = a.lse_batch * a.batch;
  }
  if (o.mask.has_value()) set_mask(a, *o.mask);
  a.slopes = static_cast<const float*>(data_or_null(o.slopes));
  a.slopes_batch = o.slopes.has_value() && o.slopes->dim() == 2 ? a.heads : 0;
  a.sinks = static_cast<const float*>(data_or_null(o.sinks));
  a.causal = o.causal;
  a.window = o.window;
  a.scale = static_cast<float>(o.scale);
  a.softcap = static_cast<float>(o.softcap);
  a.dtype = dtype_of(q);
  return a;
}

// Multiply-adds of one product over the whole call, masks aside.
double products(const Attention& a) {
  return static_cast<double>(a.batch * a.heads * a.tq) * static_cast<double>(a.tk) *
         static_cast<double>(a.d + a.dv) / (a.causal && a.tq == a.tk ? 4.0 : 2.0);
}

// Threads worth waking up: a wake-up costs a few microseconds.
int64_t workers_for(double multiply_adds, int64_t tasks) {
  if (multiply_adds < 5e4) return 1;
  return std::min<int64_t>(tasks, torch::stable::get_num_threads());
}

// A worker whose memory is smaller keeps it on its stack.
constexpr int64_t kStackFloats = 16 * 1024;

// Each worker takes the next task until none is left; who runs which task changes no bit.
template <class Args>
void run_tasks(const Args& args, int64_t tasks, int64_t workers, int64_t scratch,
               void (*kernel)(const Args&, int64_t, float*)) {
  if (tasks == 0) return;
  const bool small = scratch <= kStackFloats;
  std::optional<Tensor> memory;
  if (!small) memory = empty_cpu({workers * scratch}, ScalarType::Float);
  float* base = small ? nullptr : static_cast<float*>(memory->mutable_data_ptr());
  std::atomic<int64_t> next{0};
  const auto take = [&](float* room) {
    for (int64_t t = next++; t < tasks; t = next++) kernel(args, t, room);
  };
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      if (small) {
        alignas(64) float room[kStackFloats];
        take(room);
      } else {
        take(base + w * scratch);
      }
    }
  };
  if (workers <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, work);
  }
}

void run_forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Options& options,
                 const Tensor& out, Tensor* lse) {
  const Tensor q = unit_rows(q_), k = unit_rows(k_), v = unit_rows(v_);
  AttentionForward f{describe(q, k, v, options), head_rows(out), nullptr, kForwardBlocks};
  if (lse != nullptr) f.lse = static_cast<float*>(lse->mutable_data_ptr());
  const int64_t heads = f.a.batch * f.a.kv_heads;
  if (q.numel() == 0) return;
  const auto mask_blocks = read_mask(f.a);
  const double work = products(f.a);
  const int64_t threads = work < 5e4 ? 1 : torch::stable::get_num_threads();
  while (f.blocks_per_task > 1 && threads > 1 &&
         heads * attention_query_chunks(f.a, f.blocks_per_task) < 4 * threads) {
    f.blocks_per_task /= 2;
  }
  const int64_t tasks = heads * attention_query_chunks(f.a, f.blocks_per_task);
  const AttentionKernels& kernels = attention_kernels();
  run_tasks(f, tasks, workers_for(work, tasks), kernels.forward_scratch(f), kernels.forward);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& slopes,
                 const std::optional<Tensor>& sinks, const std::optional<Tensor>& starts_q,
                 const std::optional<Tensor>& starts_k, bool causal, int64_t window, double scale,
                 double softcap) {
  check(q, k, v);
  Tensor out = empty_heads(q, v.size(-1), true);
  run_forward(q, k, v, {mask, slopes, sinks, starts_q, starts_k, causal, window, scale, softcap},
              out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> attention_lse(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& mask,
                                         const std::optional<Tensor>& slopes,
                                         const std::optional<Tensor>& sinks,
                                         const std::optional<Tensor>& starts_q,
                                         const std::optional<Tensor>& starts_k, bool causal,
                                         int64_t window, double scale, double softcap) {
  check(q, k, v);
  Tensor out = empty_heads(q, v.size(-1), true);
  Tensor lse = q.dim() == 3 ? empty_cpu({2, q.size(1), q.size(0)}, ScalarType::Float)
                            : empty_cpu({2, q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  run_forward(q, k, v, {mask, slopes, sinks, starts_q, starts_k, causal, window, scale, softcap},
              out, &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const std::optional<Tensor>& grad_lse_, const Tensor& q_, const Tensor& k_,
    const Tensor& v_, const Tensor& out_, const Tensor& lse_, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& slopes, const std::optional<Tensor>& starts_q,
    const std::optional<Tensor>& starts_k, bool causal, int64_t window, double scale,
    double softcap) {
  const Tensor q = unit_rows(q_), k = unit_rows(k_), v = unit_rows(v_);
  const Tensor out = unit_rows(out_), grad = unit_rows(grad_), lse = dense(lse_);
  const auto grad_lse = dense(grad_lse_);
  Tensor dq = empty_gradient(q_), dk = empty_gradient(k_), dv = empty_gradient(v_);
  const std::optional<Tensor> none;
  AttentionBackward f{
      describe(q, k, v, {mask, slopes, none, starts_q, starts_k, causal, window, scale, softcap}),
      head_rows(out),
      head_rows(grad),
      head_rows(dq),
      head_rows(dk),
      head_rows(dv),
      static_cast<const float*>(lse.const_data_ptr()),
      static_cast<const float*>(data_or_null(grad_lse)),
      kBackwardBlocks,
      false};
  const int64_t heads = f.a.batch * f.a.kv_heads;
  if (heads == 0 || (q.numel() == 0 && k.numel() == 0 && v.numel() == 0)) {
    return {dq, dk, dv};
  }
  const auto mask_blocks = read_mask(f.a);
  const double work = 2.5 * products(f.a);
  const int64_t threads = work < 5e4 ? 1 : torch::stable::get_num_threads();
  // Split, a head takes seven products instead of five, but never leaves a thread without work.
  f.split = 5 * ((heads + threads - 1) / threads) * threads > 7 * heads;
  int64_t tasks = heads;
  if (f.split) {
    const auto count = [&] {
      return attention_query_chunks(f.a, f.blocks_per_task) +
             attention_key_chunks(f.a, f.blocks_per_task);
    };
    while (f.blocks_per_task > 1 && heads * count() < 8 * threads) f.blocks_per_task /= 2;
    tasks = heads * count();
  }
  const AttentionKernels& kernels = attention_kernels();
  run_tasks(f, tasks, workers_for(work, tasks), kernels.backward_scratch(f), kernels.backward);
  return {dq, dk, dv};
}

Tensor attention_sinks_backward(const Tensor& grad_, const std::optional<Tensor>& grad_lse_,
                                const Tensor& out_, const Tensor& lse_, const Tensor& sinks_,
                                const std::optional<Tensor>& starts_q) {
  const Tensor grad = unit_rows(grad_), out = unit_rows(out_), lse = dense(lse_);
  const auto grad_lse = dense(grad_lse_), sinks = dense(std::optional<Tensor>(sinks_));
  const std::optional<Tensor> none;
  AttentionBackward f{};
  f.a = describe(out, out, out, {none, none, sinks, starts_q, none, false, 0, 1.0, 0.0});
  f.out = head_rows(out);
  f.grad = head_rows(grad);
  f.lse = static_cast<const float*>(lse.const_data_ptr());
  f.grad_lse = static_cast<const float*>(data_or_null(grad_lse));
  const int64_t heads = f.a.heads, parts = f.a.batch * heads;
  const Tensor partial = empty_cpu({parts}, ScalarType::Double);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  const AttentionKernels& kernels = attention_kernels();
  parallel_rows(parts, 2 * f.a.tq * f.a.dv * static_cast<int64_t>(out.element_size()),
                [&](int64_t begin, int64_t end) { kernels.sink_gradient(f, begin, end, sums); });
  Tensor result = empty_cpu({heads}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < f.a.batch; ++b) sum += sums[b * heads + h];
    to[h] = static_cast<float>(sum);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_lse", TORCH_BOX(&attention_lse));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_sinks_backward", TORCH_BOX(&attention_sinks_backward));
}

}  // namespace fastlm
