// What the parts of the emulator share. One launch runs at a time.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "fiber.h"
#include "gpusim.h"

namespace gpusim {

constexpr int LANES = 32;

struct Warp {
  int first;               // number of its first thread
  uint32_t arrived, mask;  // lanes at the operation under way, and those that it is for
  Operation operation;
  void* operands[LANES];
  char key;  // of __syncwarp, for TSan
};

struct BlockThread {
  Thread thread;
  Fiber fiber;
  bool exited;
  std::vector<Copy> copies;
  size_t finished_copies;
  int groups;  // committed
};

/// What a launch did in one registered buffer.
struct Traffic {
  std::string buffer;
  uint64_t bytes_read = 0, bytes_written = 0;    // as requested
  uint64_t unique_read = 0, unique_written = 0;  // different ones
};

/// What a launch was and did.
struct Record {
  std::string kernel;
  dim3 grid, block;
  uint64_t dynamic_shared = 0, static_shared = 0;
  uint64_t mma = 0, shuffles = 0, barriers = 0;   // by warps, by warps, by blocks
  uint64_t ldmatrix = 0, ldmatrix_conflicts = 0;  // 8x8 matrices, and cycles that they lost to bank conflicts
  uint64_t copies = 0;                            // cp.async, by threads
  std::vector<Traffic> traffic;
};

/// What the host has set, and what has been recorded.
struct Settings {
  uint64_t seed = 0;  // of the schedule; 0: threads and blocks in order
  bool recording = false;
};
extern Settings settings;
extern std::vector<Record> records;
extern Record record;  // of the launch under way

// block.cpp
BlockThread& current();
void wake(int thread);    // runnable from now on
void wait_for_wake();     // gives way until somebody wakes the running thread
uint32_t block_number();  // in the grid
uint32_t barrier_epoch();

// warp.cpp
extern std::vector<Warp> warps;
void reset_warps(int threads);
int lanes_waiting();

// memory.cpp
void begin_memory();  // of a launch
void end_memory();
void begin_shared(size_t dynamic_bytes, uint64_t limit);  // of a block
std::string end_shared();                                 // what writes beyond its bounds were found
void end_copies();                                        // of a thread

}  // namespace gpusim
