// Runs CUDA kernels on the CPU, one block after another, so that a machine without a GPU can check
// what they compute and how they use memory. This header is what a kernel's source sees.
//
// Each thread of a block is a fiber; barriers and shuffles switch between them (emulator.cpp).
// Every load and store of the kernel is seen (memory.cpp). The first of these ends the launch with
// an error that names kernel, block, thread and line:
//   - an access outside the tensors handed to the kernel, a write to one it may only read;
//   - an access outside a shared array, on either side;
//   - an access of several bytes at an address that is no multiple of them;
//   - two threads that meet at one place of shared memory, one of them writing, without a barrier
//     between (within a warp __syncwarp counts as one; shuffles order nothing);
//   - threads that wait at different barriers, or for one that has ended.
// What it cannot express: atomics, asynchronous copies, clusters, wgmma, partial warps and masks,
// memory order between blocks, speed. A kernel that needs those does not compile here, or ends with
// an error.
#pragma once
#include <math.h>
#include <stdint.h>

#define FASTLM_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
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
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

extern dim3 thread_index, block_index, block_size, grid_size;

// Where in the kernel's source a barrier stands; a default argument takes it from the caller.
struct Place {
  const char* file;
  int line;
};
inline Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

[[noreturn]] void fail(const char* why);  // ends the launch, from within a kernel
void sync_block(Place place);
void sync_warp(unsigned mask, Place place);

// Each lane hands in `bytes` of `mine`; when all 32 have, gets those of `count` lanes.
void exchange(const void* mine, unsigned bytes, unsigned lane, unsigned count, void* out,
              Place place);

// c += A B of a warp's fragments: a lane hands in its 8 elements of A and 4 of B
// (csrc/cuda/mma.cuh).
void multiply(const float (&mine)[12], float (&c)[4], Place place);

// The shared array declared under this name in this line: the same for all threads of a block.
void* shared_array(const char* name, unsigned bytes, int line);
void* dynamic_shared();  // extern __shared__
template <class T>
T& shared(const char* name, int line) {
  return *static_cast<T*>(shared_array(name, sizeof(T), line));
}

void run(const char* kernel, void (*call)(const void*), const void* closure, dim3 grid, dim3 block,
         unsigned dynamic_bytes);

// What `kernel<<<grid, threads, dynamic, stream>>>(...)` becomes.
template <class F>
void launch(const char* kernel, const F& body, dim3 grid, dim3 block, unsigned dynamic = 0,
            cudaStream_t = nullptr) {
  run(kernel, [](const void* f) { (*static_cast<const F*>(f))(); }, &body, grid, block, dynamic);
}
template <class F>
void launch(const char* kernel, const F& body, unsigned grid, unsigned block, unsigned dynamic = 0,
            cudaStream_t = nullptr) {
  launch(kernel, body, dim3{grid}, dim3{block}, dynamic);
}

template <class T>
T from_lane(T value, unsigned lane, Place place) {
  T other;
  exchange(&value, sizeof value, lane % 32, 1, &other, place);
  return other;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads(emulator::Place p = emulator::here()) { emulator::sync_block(p); }
inline void __syncwarp(unsigned mask = ~0u, emulator::Place p = emulator::here()) {
  emulator::sync_warp(mask, p);
}

namespace emulator {
inline void whole_warp(unsigned mask) {
  if (mask != ~0u) fail("the emulator knows whole warps alone");
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              emulator::Place p = emulator::here()) {
  emulator::whole_warp(mask);
  const unsigned first = threadIdx.x % 32 / width * width;
  return emulator::from_lane(value, first + static_cast<unsigned>(lane) % width, p);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, emulator::Place p = emulator::here()) {
  emulator::whole_warp(mask);
  return emulator::from_lane(value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes), p);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, emulator::Place p = emulator::here()) {
  emulator::whole_warp(mask);
  const unsigned lane = threadIdx.x % 32, from = lane + lanes;
  return emulator::from_lane(value, from < 32 ? from : lane, p);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, emulator::Place p = emulator::here()) {
  emulator::whole_warp(mask);
  const unsigned lane = threadIdx.x % 32;
  return emulator::from_lane(value, lane >= lanes ? lane - lanes : lane, p);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emulator::Place p = emulator::here()) {
  emulator::whole_warp(mask);
  const bool mine = vote != 0;
  bool all[32];
  emulator::exchange(&mine, sizeof mine, 0, 32, all, p);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int vote, emulator::Place p = emulator::here()) {
  return __ballot_sync(mask, vote, p) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulator::Place p = emulator::here()) {
  return __ballot_sync(mask, vote, p) == ~0u;
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

inline unsigned long long __float2ull_rn(float value) {
  return static_cast<unsigned long long>(llrintf(value));
}

inline void __stwb(uint4* p, uint4 value) { *p = value; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
