// What emulator.cpp and memory.cpp share: the block that runs.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

struct Barrier {
  unsigned arrived = 0, generation = 0;
  Place place{};            // of those that wait
  unsigned first = 0;       // who came first
  char values[2][32 * 64];  // by turns, so that one wait is enough for an exchange
};

struct Fiber {
  ucontext_t context;  // of its start; _setjmp and _longjmp switch without a system call
  jmp_buf place;
  bool started = false, done = false;
  const Barrier* waits = nullptr;
  unsigned waited = 0;  // for a generation after this one
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<unsigned> warp_order;  // how often __syncwarp ordered a warp's memory
  jmp_buf scheduler;
  unsigned current = 0, dynamic_bytes = 0;
  const char* kernel = nullptr;
  std::string fault;
};

extern Block* block;          // null between launches
extern uint64_t block_epoch;  // counts the intervals between block barriers of all blocks so far
constexpr unsigned kStack = 64 * 1024;
char* stack_of(unsigned thread);

// memory.cpp
void begin_launch(const void* host_frame);
void begin_block();
void touch(const void* address, unsigned bytes, bool write, const void* code);

}  // namespace emulator
