// Blocks and their threads: the schedule, the barrier, the launch.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "runtime.h"

namespace gpusim {

Thread* self;
Settings settings;
std::vector<Record> records;
Record record;

namespace {

constexpr int MAX_THREADS = 1024;         // of a block
constexpr uint64_t MAX_BLOCKS = 1 << 24;  // more are more than one wants to emulate

std::vector<std::unique_ptr<BlockThread>> threads;  // of the block under way: the first `alive_at_start`
std::vector<int> runnable, at_barrier;
int alive, alive_at_start;
uint32_t number_of_block, epoch;
const char* barrier_file;
int barrier_line;
const recorder::Launch* launched;
bool failed;
std::string message;
char barrier_key, block_begins, block_ends;  // for TSan
uint64_t random_state;

uint32_t random_number() {  // xorshift64 (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16);
}

void open_barrier_if_complete() {
  if (alive == 0 || int(at_barrier.size()) < alive) return;
  if (alive < alive_at_start)
    fail("%s:%d: __syncthreads() completes although %d threads have exited", barrier_file, barrier_line,
         alive_at_start - alive);
  record.barriers++;
  epoch++;
  for (int thread : at_barrier) runnable.push_back(thread);
  at_barrier.clear();
}

void thread_body() {
  acquire(&block_begins);
  launched->body(launched->kernel, launched->arguments);
  end_copies();
  release(&block_ends);
  BlockThread& thread = current();
  thread.exited = true;
  alive--;
  open_barrier_if_complete();
  thread.fiber.leave();
}

void start_threads(dim3 grid, dim3 block) {
  alive = alive_at_start = block.x * block.y * block.z;
  while (int(threads.size()) < alive) threads.push_back(std::make_unique<BlockThread>());
  reset_warps(alive);
  runnable.clear();
  at_barrier.clear();
  runnable.reserve(MAX_THREADS);  // threads add to these lists, and should not allocate
  at_barrier.reserve(MAX_THREADS);
  epoch = 0;
  const uint3 position = {number_of_block % grid.x, number_of_block / grid.x % grid.y,
                          number_of_block / grid.x / grid.y};
  for (int i = alive; i-- > 0;) {  // the last in the list is the first to run
    BlockThread& t = *threads[i];
    const uint3 index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t.thread = {index, position, block, grid, i, i % LANES, i / LANES};
    t.exited = false;
    t.copies.clear();
    t.finished_copies = 0;
    t.groups = 0;
    t.fiber.start(thread_body);
    runnable.push_back(i);
  }
}

void run_threads() {
  while (alive && !failed) {
    if (runnable.empty()) {
      failed = true;
      message = "deadlock: " + std::to_string(at_barrier.size()) + " threads wait at __syncthreads(), " +
                std::to_string(lanes_waiting()) + " in warp operations, " + std::to_string(alive_at_start - alive) +
                " have exited";
      return;
    }
    if (settings.seed) std::swap(runnable[random_number() % runnable.size()], runnable.back());
    BlockThread& thread = *threads[runnable.back()];
    runnable.pop_back();
    self = &thread.thread;
    thread.fiber.resume();
  }
}

void run_block() {
  begin_shared(launched->shared, launched->shared_limit);
  start_threads(launched->grid, launched->block);
  release(&block_begins);
  run_threads();
  acquire(&block_ends);
  const std::string damage = end_shared();
  if (!failed && !damage.empty()) {
    failed = true;
    message = damage;
  }
}

std::vector<uint32_t> order_of_blocks(uint32_t count) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; i++) order[i] = i;
  if (settings.seed)
    for (uint32_t i = count; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

/// What the runtime has a launch run by; one at a time.
int run_grid(const recorder::Launch* launch) {
  const uint64_t blocks = uint64_t(launch->grid.x) * launch->grid.y * launch->grid.z;
  if (blocks > MAX_BLOCKS)
    return recorder::refuse(cudaErrorInvalidConfiguration, std::to_string(blocks) + " blocks are too many to emulate");
  random_state = 88172645463325252ull + settings.seed * 0x9E3779B97F4A7C15ull;
  failed = false;
  launched = launch;
  record = Record();
  record.kernel = launch->name;
  record.grid = launch->grid;
  record.block = launch->block;
  record.dynamic_shared = launch->shared;
  begin_memory();
  for (uint32_t block : order_of_blocks(uint32_t(blocks))) {
    number_of_block = block;
    run_block();
    if (failed) break;
  }
  end_memory();
  if (failed) return recorder::refuse(cudaErrorLaunchFailure, message);
  if (settings.recording) records.push_back(record);
  return cudaSuccess;
}

[[maybe_unused]] const auto nobody = recorder_set_run(run_grid);  // when the library is loaded

}  // namespace

BlockThread& current() { return *threads[self->number]; }
void wake(int thread) { runnable.push_back(thread); }
uint32_t block_number() { return number_of_block; }
uint32_t barrier_epoch() { return epoch; }

void wait_for_wake() {
  BlockThread& me = current();
  me.fiber.give_way();
  self = &me.thread;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!failed) message = text;
  failed = true;
  current().fiber.leave();
}

void barrier(const char* file, int line) {
  if (at_barrier.empty()) {
    barrier_file = file;
    barrier_line = line;
  } else if (barrier_line != line || strcmp(barrier_file, file) != 0) {
    fail("divergent __syncthreads(): thread %d is at %s:%d, others at %s:%d", self->number, file, line, barrier_file,
         barrier_line);
  }
  release(&barrier_key);
  at_barrier.push_back(self->number);
  open_barrier_if_complete();  // when complete, everybody is runnable again, this thread too
  wait_for_wake();
  acquire(&barrier_key);
}

}  // namespace gpusim
