// Runs simple CUDA kernels on the CPU, one block after another, so that a machine without a GPU can
// check what they compute. Each thread of a block is a fiber; __syncthreads and the shuffles switch
// between them, so a barrier that some thread misses shows as an endless wait and is reported.
// Fibers take turns upwards and downwards by turns, so that a barrier left out shows as a wrong
// result. What it cannot show: races within a warp, memory models, speed. No tensor cores, no
// atomics.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static  // blocks run one at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  struct Fiber {
    ucontext_t context;  // of its start; _setjmp and _longjmp switch without a system call
    jmp_buf place;
    bool started = false, done = false;
  };
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;  // one value per thread, for shuffles
  Barrier all;
  jmp_buf scheduler;
  unsigned current = 0;
  const std::function<void()>* kernel = nullptr;
};

inline Block* block = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block
inline dim3 thread_index, block_index, block_size, grid_size;

inline void yield() {
  const unsigned self = block->current;
  if (_setjmp(block->fibers[self].place) == 0) _longjmp(block->scheduler, 1);
  thread_index.x = self;
}

inline void wait(Barrier& barrier, unsigned members) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  (*block->kernel)();
  block->fibers[block->current].done = true;
  _longjmp(block->scheduler, 1);
}

inline void resume(Block::Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  Block self;
  block = &self;
  self.kernel = &kernel;
  self.fibers.resize(threads);
  self.warps.resize((threads + 31) / 32);
  self.exchange.resize(threads);
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
  for (unsigned t = 0; t < threads; ++t) {
    ucontext_t& context = self.fibers[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[t].get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, enter, 0);
  }
  unsigned alive = threads;
  for (int64_t rounds = 0; alive > 0; ++rounds) {
    if (rounds > 1000 * 1000) {
      fprintf(stderr, "emulator: a barrier waits for a thread that never comes\n");
      abort();
    }
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = (rounds + block_index.x) % 2 == 0 ? i : threads - 1 - i;
      if (self.fibers[t].done) continue;
      self.current = thread_index.x = t;
      resume(self.fibers[t]);
      if (self.fibers[t].done) --alive;
    }
  }
  block = nullptr;
}

// What `kernel<<<grid, threads, 0, stream>>>(...)` becomes.
template <class F>
void launch(const F& kernel, unsigned grid, unsigned threads, int = 0, cudaStream_t = nullptr) {
  block_size.x = threads;
  grid_size.x = grid;
  const std::function<void()> body = kernel;
  for (unsigned b = 0; b < grid; ++b) {
    block_index.x = b;
    run_block(threads, body);
  }
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::wait(emulator::block->all, blockDim.x); }

namespace emulator {

// What the lane of another number in the warp holds.
template <class T>
T exchange(unsigned mask, T value, unsigned lane) {
  if (mask != 0xffffffffu) abort();
  const unsigned self = threadIdx.x;
  Barrier& warp = block->warps[self / 32];
  __builtin_memcpy(&block->exchange[self], &value, sizeof value);
  wait(warp, 32);
  T other;
  __builtin_memcpy(&other, &block->exchange[self / 32 * 32 + lane % 32], sizeof other);
  wait(warp, 32);
  return other;
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::exchange(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::exchange(mask, value, static_cast<unsigned>(lane));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned self = threadIdx.x % 32;
  return emulator::exchange(mask, value, self < lanes ? self : self - lanes);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i & 7u;
    out |= static_cast<unsigned>(bytes >> 8 * which & 255u) << 8 * i;
  }
  return out;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline unsigned long long __float2ull_rn(float value) {
  return static_cast<unsigned long long>(llrintf(value));
}

inline void __stwb(uint4* p, uint4 value) { *p = value; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
