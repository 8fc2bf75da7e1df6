// Fibers, barriers and launches of the emulator.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>

#include "fibers.h"

namespace emulator {

dim3 thread_index, block_index, block_size, grid_size;
Block* block = nullptr;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
uint64_t block_epoch = 0;

namespace {

// In a function of its own: one that comes back to a place of its own may not leave for another.
[[noreturn, gnu::noinline]] void jump(Jump& place) { __builtin_longjmp(place, 1); }

void (*body)(const void*);
const void* arguments;

std::string base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}
std::string text(Place place) { return base_name(place.file) + ":" + std::to_string(place.line); }

void become(unsigned thread) {
  block->current = thread;
  thread_index.x = thread % block_size.x;
  thread_index.y = thread / block_size.x % block_size.y;
  thread_index.z = thread / block_size.x / block_size.y;
}

// Returns when `members` threads stand at the barrier.
void wait(Barrier& barrier, unsigned members, Place place, const char* what) {
  if (barrier.arrived == 0) {
    barrier.place = place;
    barrier.first = block->current;
  } else if (barrier.place.line != place.line ||
             (barrier.place.file != place.file && strcmp(barrier.place.file, place.file) != 0)) {
    const std::string why = std::string("waits at ") + what + " of " + text(place) +
                            " while thread " + std::to_string(barrier.first) + " waits at " +
                            text(barrier.place);
    fail(why.c_str());
  }
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    if (&barrier == &block->all) ++block_epoch;
    return;
  }
  Fiber& self = *fibers[block->current];
  self.waits = &barrier;
  self.waited = generation;
  if (__builtin_setjmp(self.place) == 0) jump(block->scheduler);
  self.waits = nullptr;
}

void enter() {
  for (;;) {
    body(arguments);
    Fiber& self = *fibers[block->current];
    self.done = true;
    if (__builtin_setjmp(self.place) == 0) jump(block->scheduler);
  }
}

void resume(Fiber& fiber) {
  if (__builtin_setjmp(block->scheduler) != 0) return;
  if (fiber.started) jump(fiber.place);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Who waits where, when nobody can go on.
std::string stuck() {
  std::string said = "a barrier waits for threads that never come:";
  std::string last;
  unsigned from = 0;
  const auto state = [&](unsigned t) {
    const Fiber& f = *fibers[t];
    return f.done ? std::string("ended") : "waits at " + text(f.waits->place);
  };
  for (unsigned t = 0; t < block->threads; ++t) {
    if (t > 0 && state(t) == last) continue;
    if (t > 0) said += " to " + std::to_string(t - 1) + " " + last + ",";
    last = state(t);
    from = t;
    said += " thread " + std::to_string(from);
  }
  return said + " to " + std::to_string(block->threads - 1) + " " + last;
}

void run_block() {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  Block& self = *block;
  ++block_epoch;
  self.threads = threads;
  self.all = Barrier();
  warps.resize((threads + 31) / 32);
  for (Warp& warp : warps) warp.barrier = Barrier(), warp.order = 0;
  while (fibers.size() < threads) {
    Fiber& fiber = *fibers.emplace_back(new Fiber);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned t = 0; t < threads; ++t) fibers[t]->done = false;
  begin_block();
  unsigned alive = threads;
  for (int64_t round = block_index.x; alive > 0; ++round) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {  // upwards and downwards by turns
      const unsigned t = round % 2 == 0 ? i : threads - 1 - i;
      Fiber& fiber = *fibers[t];
      if (fiber.done || (fiber.waits != nullptr && fiber.waits->generation == fiber.waited)) {
        continue;
      }
      moved = true;
      become(t);
      resume(fiber);
      if (!self.fault.empty()) return;
      if (fiber.done) --alive;
    }
    if (!moved) {
      self.fault = stuck();
      return;
    }
  }
}

}  // namespace

void fail(const char* why) {
  block->fault = "thread " + std::to_string(block->current) + " " + why;
  jump(block->scheduler);
}

void sync_block(Place place) { wait(block->all, block->threads, place, "__syncthreads"); }

void sync_warp(unsigned mask, Place place) {
  whole_warp(mask);
  Warp& warp = warps[block->current / 32];
  if (warp.barrier.arrived == 31) ++warp.order;
  wait(warp.barrier, 32, place, "__syncwarp");
}

void exchange(const void* mine, unsigned bytes, unsigned lane, unsigned count, void* out,
              Place place) {
  if (bytes > 64) fail("exchanges more than the emulator holds");
  Warp& warp = warps[block->current / 32];
  char* values = warp.values[warp.barrier.generation % 2];
  memcpy(values + block->current % 32 * bytes, mine, bytes);
  wait(warp.barrier, 32, place, "a shuffle");
  memcpy(out, values + lane * bytes, size_t{count} * bytes);
}

void multiply(const float (&mine)[12], float (&c)[4], Place place) {
  float all[32][12];
  exchange(mine, sizeof mine, 0, 32, all, place);
  const unsigned lane = block->current % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float x = all[row % 8 * 4 + k % 8 / 2][(row / 8 + k / 8 * 2) * 2 + k % 2];
      c[i] += x * all[col * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
    }
  }
}

void run(const char* kernel, void (*call)(const void*), const void* closure, dim3 grid, dim3 size,
         unsigned dynamic_bytes) {
  body = call;
  arguments = closure;
  block_size = size;
  grid_size = grid;
  Block self;
  self.kernel = kernel;
  self.dynamic_bytes = dynamic_bytes;
  begin_launch(__builtin_frame_address(0));  // the launchers' frames lie above
  block = &self;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && self.fault.empty(); ++x) {
        block_index = {x, y, z};
        run_block();
      }
    }
  }
  block = nullptr;
  if (self.fault.empty()) return;
  fibers.clear();  // they stopped in the middle
  const std::string where = std::to_string(block_index.x) +
                            (grid.y * grid.z == 1 ? ""
                                                  : ", " + std::to_string(block_index.y) + ", " +
                                                        std::to_string(block_index.z));
  throw std::runtime_error(std::string(kernel) + ", block " + where + ": " + self.fault);
}

}  // namespace emulator
