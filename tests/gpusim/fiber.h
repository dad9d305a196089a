// A stack of its own on which a function runs until it gives way. The sanitizers are told of every switch.
#pragma once
#include <cstddef>

namespace gpusim {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;

  /// From now on resume() runs `function`, from its beginning, wherever it stood. It must end in leave().
  void start(void (*function)());
  /// Called by the scheduler: goes on where the fiber gave way, until it does so again or leaves.
  void resume();
  /// Called on the fiber: back to the scheduler.
  void give_way();
  [[noreturn]] void leave();

 private:
  static void begin();
  void to_scheduler();

  void (*function_)() = nullptr;
  char* stack_ = nullptr;
  void* pointer_ = nullptr;  // into the stack, while it isn't running
  void* tsan_ = nullptr;
  void* asan_ = nullptr;
  bool left_ = false;
};

/// What happened before release(key) is seen to happen before what follows acquire(key). Nothing without TSan.
void release(void* key);
void acquire(void* key);

/// As long as one lives, what the running fiber does is none of TSan's business: the runtime's own allocations.
struct Unwatched {
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
};

bool under_asan();

/// Fresh memory: TSan knows nothing of what was there before, ASan keeps red zones around it.
void* new_memory(size_t bytes, size_t alignment);
void delete_memory(void* memory, size_t bytes);

}  // namespace gpusim
