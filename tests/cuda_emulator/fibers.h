// What emulator.cpp and memory.cpp share: the block that runs.
#pragma once
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr unsigned kStack = 64 * 1024;

// Where __builtin_longjmp goes on. (libc's also looks for handlers to run: a third of a switch.)
using Jump = void* [5];

struct Barrier {
  unsigned arrived = 0, generation = 0;
  Place place{};       // of those that wait
  unsigned first = 0;  // who came first
};

struct Warp {
  Barrier barrier;
  unsigned order = 0;       // how often __syncwarp ordered its memory
  char values[2][32 * 64];  // by turns, so that one wait is enough for an exchange
};

// Runs one thread of a block after another: what its start costs is paid once.
struct Fiber {
  ucontext_t context;  // of its start; jumps switch without a system call
  Jump place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
  const Barrier* waits = nullptr;
  unsigned waited = 0;  // for a generation after this one
};

struct Block {
  unsigned threads = 0;
  Barrier all;
  Jump scheduler;
  unsigned current = 0, dynamic_bytes = 0;
  const char* kernel = nullptr;
  std::string fault;
};

extern Block* block;                                // null between launches
extern std::vector<std::unique_ptr<Fiber>> fibers;  // at least one a thread of the block
extern std::vector<Warp> warps;
extern uint64_t block_epoch;  // counts the intervals between block barriers of all blocks so far

// memory.cpp
void begin_launch(const void* host_frame);
void begin_block();
void touch(const void* address, unsigned bytes, bool write, const void* code);

}  // namespace emulator
