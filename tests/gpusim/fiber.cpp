// Never compiled with a sanitizer: these functions are what the sanitizers ask of those who switch stacks. They are
// weak, and null when the program runs without.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

#define WEAK __attribute__((weak))
extern "C" {
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_acquire(void* key);
WEAK void __tsan_release(void* key);
WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_unpoison_memory_region(const volatile void* memory, size_t size);

void gpusim_switch(void** save, void* load);
}
asm(R"(
.text
.local gpusim_switch
.type gpusim_switch, @function
gpusim_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace gpusim {
namespace {

constexpr size_t STACK = 256 << 10, PAGE = 4096;
constexpr unsigned NO_SYNCHRONISATION = 1;  // a switch orders nothing, to TSan: only release and acquire do

Fiber* running;
void* scheduler;  // its stack pointer, while a fiber runs
void *scheduler_tsan, *scheduler_asan;
const void* scheduler_bottom;
size_t scheduler_size;

char* new_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) abort();
  return static_cast<char*>(pages);
}

size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

}  // namespace

Fiber::~Fiber() {
  if (tsan_) __tsan_destroy_fiber(tsan_);
  if (stack_) munmap(stack_, STACK);
}

void Fiber::start(void (*function)()) {
  if (!stack_) {
    stack_ = new_pages(STACK);
    mprotect(stack_, PAGE, PROT_NONE);  // an overflow stops here
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_ + PAGE, STACK - PAGE);
  if (__tsan_create_fiber && !tsan_) tsan_ = __tsan_create_fiber(0);  // one for a stack: its own writes are no races
  function_ = function;
  left_ = false;
  void** top = reinterpret_cast<void**>(stack_ + STACK - 64);
  *--top = nullptr;  // where begin() would return to; also puts the stack where a call would
  *--top = reinterpret_cast<void*>(&begin);
  top -= 6;  // the registers that gpusim_switch takes off
  memset(top, 0, 6 * sizeof(void*));
  pointer_ = top;
}

void Fiber::begin() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  running->function_();
  abort();  // functions end in leave()
}

void Fiber::resume() {
  running = this;
  if (__tsan_switch_to_fiber) {
    scheduler_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, NO_SYNCHRONISATION);
  }
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_asan, stack_, STACK);
  gpusim_switch(&scheduler, pointer_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
}

void Fiber::to_scheduler() {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan, NO_SYNCHRONISATION);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(left_ ? nullptr : &asan_, scheduler_bottom, scheduler_size);
  gpusim_switch(&pointer_, scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan_, &scheduler_bottom, &scheduler_size);
}

void Fiber::give_way() { to_scheduler(); }

void Fiber::leave() {
  left_ = true;
  to_scheduler();
  abort();  // nobody resumes it
}

Unwatched::Unwatched() {
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unwatched::~Unwatched() {
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

bool under_asan() { return __asan_unpoison_memory_region; }

void release(void* key) {
  if (__tsan_release) __tsan_release(key);
}
void acquire(void* key) {
  if (__tsan_acquire) __tsan_acquire(key);
}

void* new_memory(size_t bytes, size_t alignment) {
  if (__tsan_create_fiber) return new_pages(whole_pages(bytes));
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes)) abort();
  return memory;
}
void delete_memory(void* memory, size_t bytes) {
  if (__tsan_create_fiber) {
    munmap(memory, whole_pages(bytes));
  } else {
    free(memory);
  }
}

}  // namespace gpusim
