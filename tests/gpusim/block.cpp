// Blocks and their threads: the schedule, the barrier, the launch.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>

#include "runtime.h"

namespace gpusim {

Thread* self;
Settings settings;
std::vector<Record> records;
Record record;

namespace {

constexpr int MAX_THREADS = 1024;  // of a block

std::vector<std::unique_ptr<BlockThread>> threads;  // of the block under way: the first `alive_at_start`
std::vector<int> runnable, at_barrier;
int alive, alive_at_start;
uint32_t number_of_block, epoch;
const char* barrier_file;
int barrier_line;
const std::function<void()>* body;
bool failed;
std::string message, last_message, next_name = "kernel";
char barrier_key, block_begins, block_ends;  // for TSan
std::map<const void*, int> opted_in;         // dynamic shared memory that a kernel may have
int current_device;
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
  (*body)();
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

void run_block(dim3 grid, dim3 block, size_t shared, bool may_exceed) {
  begin_shared(shared, may_exceed);
  start_threads(grid, block);
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

cudaError_t refuse(cudaError_t error, const std::string& why) {
  last_message = why;
  return error;
}

cudaError_t check_configuration(dim3 grid, dim3 block) {
  const auto text = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  if (size == 0 || size > MAX_THREADS || block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, "no block can have " + text(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "no grid can have " + text(grid) + " blocks");
  if (uint64_t(grid.x) * grid.y * grid.z > 1u << 24)
    return refuse(cudaErrorInvalidConfiguration, "more blocks than one wants to emulate: " + text(grid));
  return cudaSuccess;
}

std::mutex one_launch;

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

void name_kernel(const char* name) { next_name = name; }

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (cudaError_t error = check_configuration(grid, block)) return error;
  const auto allowed = opted_in.find(kernel);
  const bool may_exceed = allowed != opted_in.end();
  if (shared > size_t(may_exceed ? allowed->second : 48 << 10))
    return refuse(cudaErrorInvalidValue,
                  std::to_string(shared) + " bytes of dynamic shared memory, more than opted in to");
  random_state = 88172645463325252ull + settings.seed * 0x9E3779B97F4A7C15ull;
  failed = false;
  body = &thread;
  record = Record();
  record.kernel = next_name;
  record.grid = grid;
  record.block = block;
  record.dynamic_shared = shared;
  begin_memory();
  for (uint32_t block_index : order_of_blocks(grid.x * grid.y * grid.z)) {
    number_of_block = block_index;
    run_block(grid, block, shared, may_exceed);
    if (failed) break;
  }
  end_memory();
  if (failed) return refuse(cudaErrorLaunchFailure, message);
  if (settings.recording) records.push_back(record);
  return cudaSuccess;
}

}  // namespace gpusim

cudaError_t cudaGetDevice(int* device) {
  *device = gpusim::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device != 0) return gpusim::refuse(cudaErrorInvalidDevice, "there is device 0 alone");
  gpusim::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return gpusim::last_message.c_str(); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > gpusim::settings.shared_limit)
    return gpusim::refuse(cudaErrorInvalidValue, "a block has at most " +
                                                     std::to_string(gpusim::settings.shared_limit) +
                                                     " bytes of shared memory here, not " + std::to_string(value));
  gpusim::opted_in[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = gpusim::settings.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
