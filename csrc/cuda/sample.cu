// sample: the next token of a row of logits.
// Computes   p = softmax(z / T) over z_i >= the top_k-th largest, then over the fewest largest that
//            reach top_p together, then over p_i >= min_p max p; the first token whose cumulative
//            probability, in the order of the tokens, exceeds u
// Algorithm  a cut is the largest key (a float's bits in the order of the floats) that enough
//            logits reach, by count or by probability, found by bisection. It is bounded first: the
//            k-th largest of the threads' own maxima is no larger than the k-th largest of all, and
//            what falls below (1 - top_p) / vocab of the largest cannot be in the nucleus. The few
//            logits above the bound stay in registers, up to 8 a thread; where they are more the
//            row is read again until what is left between the bounds fits. Nothing is sorted. The
//            draw adds up runs of tokens, one a warp, and walks through the run it falls into
// Tile       a block of 512 threads a row, 16-byte vectors; unaligned rows go element by element
// Traffic    reads the logits once from memory, a few times more from the L2 cache
// Numerics   fp32 exponentials; probabilities are added as integers of 2^-40, so that no order
//            changes them; equal logits are kept or cut together. A row with NaN or infinity, or
//            nothing above -infinity, gives -1
// Source     Holtzman et al., arXiv:1904.09751 (top_p); Nguyen et al., arXiv:2407.01082 (min_p)
#include "ops/sample.h"

#include <cuda_runtime.h>

#include "reduce.cuh"
#include "vec.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 4;  // vectors a thread loads before it looks at them
constexpr int kSlots = 8;  // logits a thread can hold
constexpr uint32_t kWrong = ~0u;

using Mass = unsigned long long;

// Floats as integers in the same order; of bf16 and fp16 without the bits that are always zero.
template <class T>
struct Key {
  static constexpr int kShift = sizeof(T) == 4 ? 0 : __is_same(T, __half) ? 13 : 16;

  __device__ static uint32_t of(float z) {
    const uint32_t bits = __float_as_uint(z + 0.0f);  // -0 is 0
    return (bits ^ (bits >> 31 ? ~0u : 0x80000000u)) >> kShift;
  }
  __device__ static float value(uint32_t key) {
    constexpr uint32_t kDropped = (1u << kShift) - 1;
    const uint32_t bits = key << kShift;
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~(bits | kDropped));
  }
};

template <class T, int kVec>
struct Row {
  using Keys = Key<T>;
  const Sample& a;
  const T* z;
  Mass* shared;  // one per warp
  int64_t vectors;
  float top, unit;  // the largest logit, 1 / temperature
  uint32_t top_key;
  uint32_t slot[kSlots];  // keys, 0 for none
  bool all_held;          // every logit from `held_from` on is in a slot
  uint32_t held_from;

  __device__ Row(const Sample& a_, Mass* shared_)
      : a(a_),
        z(static_cast<const T*>(a_.logits) + static_cast<int64_t>(blockIdx.x) * a_.row_stride),
        shared(shared_),
        vectors((a_.vocab + kVec - 1) / kVec),
        top(0.0f),
        unit(a_.temperature == 0.0f ? 0.0f : fminf(1.0f / a_.temperature, 3.4028235e38f)),
        top_key(0),
        slot{},
        all_held(false),
        held_from(0) {}

  __device__ Vec<T, kVec> load(int64_t vector) const {
    const int64_t i = vector * kVec;
    Vec<T, kVec> v;
    if (i + kVec <= a.vocab) {
      v.load(z + i);
      return v;
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) v.set(k, i + k < a.vocab ? to_float(z[i + k]) : -INFINITY);
    return v;
  }

  // f(vector, its first token) for the thread's vectors.
  template <class F>
  __device__ void each(F&& f) const {
    for (int64_t from = threadIdx.x; from < vectors; from += kAhead * kThreads) {
      Vec<T, kVec> v[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (from + j * kThreads < vectors) v[j] = load(from + j * kThreads);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (from + j * kThreads < vectors) f(v[j], (from + j * kThreads) * kVec);
      }
    }
  }

  __device__ float exponential(float x) const { return expf((x - top) * unit); }
  __device__ static Mass mass(float sum) { return __float2ull_rn(sum * 0x1p40f); }

  __device__ Mass add_up(Mass own) const {
    Mass all[1] = {own};
    sum_over<kThreads>(all, shared);
    return all[0];
  }

  // Number or probability of the logits from `bound` on, of a vector and of the whole row.
  template <bool kMass>
  __device__ Mass weigh(const Vec<T, kVec>& v, uint32_t bound, float least) const {
    [[maybe_unused]] float sum = 0.0f;
    [[maybe_unused]] int count = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (Keys::of(v[k]) < bound) continue;
      if constexpr (kMass) {
        const float e = exponential(v[k]);
        if (e >= least) sum += e;
      } else {
        ++count;
      }
    }
    if constexpr (kMass) return mass(sum);
    return static_cast<Mass>(count);
  }
  template <bool kMass>
  __device__ Mass weigh_row(uint32_t bound) const {
    Mass own = 0;
    each([&](const Vec<T, kVec>& v, int64_t) { own += weigh<kMass>(v, bound, 0.0f); });
    return add_up(own);
  }
  template <bool kMass>
  __device__ Mass weigh_held(uint32_t bound) const {
    Mass own = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (slot[s] < bound) continue;
      own += kMass ? mass(exponential(Keys::value(slot[s]))) : 1;
    }
    return add_up(own);
  }

  // Takes the logits with lo <= key < hi into the slots; false where some thread has too many.
  __device__ bool hold(uint32_t lo, uint32_t hi) {
    int count = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) slot[s] = 0;
    each([&](const Vec<T, kVec>& v, int64_t) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const uint32_t key = Keys::of(v[k]);
        if (key < lo || key >= hi) continue;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) slot[s] = s == count ? key : slot[s];
        ++count;
      }
    });
    return add_up(count > kSlots) == 0;
  }

  // The largest key from `lo` on such that the weight of all logits that reach it is `wanted`; `lo`
  // where there is none.
  template <bool kMass>
  __device__ uint32_t cut(uint32_t lo, double wanted) {
    uint32_t hi = top_key + 1;
    Mass above = 0, beyond = 0;  // what reaches hi, and what was above the slots' logits
    bool held = all_held && held_from <= lo;
    if (!held) {
      held = all_held = hold(lo, hi);
      held_from = lo;
    }
    for (int round = 1; hi - lo > 1; ++round) {
      const uint32_t middle = lo + (hi - lo) / 2;
      const Mass weight = held ? beyond + weigh_held<kMass>(middle) : weigh_row<kMass>(middle);
      if (static_cast<double>(weight) >= wanted) {
        lo = middle;
      } else {
        hi = middle;
        above = weight;
      }
      if (!held && round % 4 == 0) {
        held = hold(lo, hi);
        beyond = above;
      }
    }
    return lo;
  }

  // A key that the logits of all cuts but the last steps of rounding reach.
  __device__ uint32_t nucleus_bound() const {
    const double least = fmax((1.0 - a.top_p) / static_cast<double>(a.vocab), a.min_p);
    const double bound = top + a.temperature * (log(least) - 1e-3);
    return Keys::of(static_cast<float>(bound) - 1e-6f * fabsf(top));
  }

  // The first token whose cumulative probability among those that are left exceeds u.
  __device__ void draw(uint32_t least_key, float least) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t run = (vectors + kWarps - 1) / kWarps;
    const int64_t begin = warp * run, end = begin + run < vectors ? begin + run : vectors;
    Mass own[1] = {0};
#pragma unroll kAhead
    for (int64_t i = begin + lane; i < end; i += 32)
      own[0] += weigh<true>(load(i), least_key, least);
    sum_over<32>(own, shared);
    __syncthreads();  // the last sum's readers are done
    if (lane == 0) shared[warp] = own[0];
    __syncthreads();
    Mass total = 0, before = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = total;
      total += shared[w];
    }
    Mass target = static_cast<Mass>(a.uniform[blockIdx.x] * static_cast<double>(total));
    if (target >= total) target = total - 1;
    if (target < before || target - before >= own[0]) return;  // in the run of another warp
    for (int64_t from = begin; from < end; from += 32) {
      const bool inside = from + lane < end;
      Vec<T, kVec> v;
      if (inside) v = load(from + lane);
      const Mass mine = inside ? weigh<true>(v, least_key, least) : 0;
      Mass until = mine;  // of the lanes up to this one
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const Mass other = __shfl_up_sync(0xffffffffu, until, offset);
        if (lane >= offset) until += other;
      }
      const Mass all = __shfl_sync(0xffffffffu, until, 31);
      if (before + all <= target) {
        before += all;
        continue;
      }
      if (target < before + until - mine || target >= before + until) return;  // another lane's
      const Mass rest = target - (before + until - mine);
      float sum = 0.0f;
      for (int k = 0; k < kVec; ++k) {
        const float e = exponential(v[k]);
        if (Keys::of(v[k]) >= least_key && e >= least) sum += e;
        if (mass(sum) <= rest) continue;
        a.token[blockIdx.x] = (from + lane) * kVec + k;
        return;
      }
    }
  }

  __device__ void run() {
    // the largest logit and, of equal ones, the first: a key above the complement of an index
    Mass best = 0;
    uint32_t own_key = 0;
    each([&](const Vec<T, kVec>& v, int64_t i) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const uint32_t key = v[k] < INFINITY ? Keys::of(v[k]) : kWrong;
        if (key <= own_key) continue;
        own_key = key;
        best = static_cast<Mass>(key) << 32 | static_cast<uint32_t>(~(i + k));
      }
    });
    best = max_over<kThreads>(best, shared);
    top_key = static_cast<uint32_t>(best >> 32);
    const uint32_t lowest = Keys::of(-INFINITY);
    if (top_key == kWrong || top_key == lowest || a.temperature == 0.0f) {
      const bool drawn = top_key != kWrong && top_key != lowest;
      if (threadIdx.x == 0)
        a.token[blockIdx.x] = drawn ? static_cast<int64_t>(~static_cast<uint32_t>(best)) : -1;
      return;
    }
    top = Keys::value(top_key);
    uint32_t least_key = lowest;
    if (a.top_k < a.vocab) {
      if (a.top_k <= kThreads) {  // of the threads' maxima first
        slot[0] = own_key;
        all_held = true;
        held_from = lowest;
        least_key = cut<false>(lowest, static_cast<double>(a.top_k));
        all_held = false;
      }
      least_key = cut<false>(least_key, static_cast<double>(a.top_k));
    }
    if (a.top_p < 1.0) {
      const bool known = all_held && held_from <= least_key;
      const Mass total = known ? weigh_held<true>(least_key) : weigh_row<true>(least_key);
      const uint32_t bound = nucleus_bound();
      least_key =
          cut<true>(bound > least_key ? bound : least_key, a.top_p * static_cast<double>(total));
    }
    draw(least_key, static_cast<float>(a.min_p));
  }
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Sample a) {
  __shared__ Mass shared[kWarps];
  Row<T, kVec>(a, shared).run();
}

template <class T>
int launch(const Sample& a, cudaStream_t stream) {
  constexpr int kVec = kVector<T>;
  const auto grid = static_cast<unsigned>(a.rows);
  if (aligned16(a.logits) && (a.rows == 1 || a.row_stride % kVec == 0)) {
    sample_kernel<T, kVec><<<grid, kThreads, 0, stream>>>(a);
  } else {
    sample_kernel<T, 1><<<grid, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace

namespace cuda {

int sample(const Sample& a, void* stream_) {
  if (a.rows == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (a.dtype) {
    case DType::kFloat32:
      return launch<float>(a, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return launch<__half>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastlm
