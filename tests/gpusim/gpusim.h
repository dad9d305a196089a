// An emulator of a GPU, as a kernel sees it: the names of CUDA C++ and of csrc/cuda/device.h for g++. Included by
// device.h when LLMBUILDER_EMULATED is defined; the runtime behind it is in the .cpp files beside this one.
//
// A thread is a fiber. Threads run one at a time, and switch at barriers and warp operations, in an order drawn from a
// seed: another seed is another schedule. Blocks run one after another, in an order drawn too. What a GPU would refuse,
// or would leave undefined, ends the launch with cudaErrorLaunchFailure and a message; what is wrong with the launch
// itself the runtime refuses (recorder.cpp). Seen here:
//
//   barriers      reached by some of the threads only, or at different lines, or after others have left; deadlocks
//   warps         lanes that call different operations or with different masks; shuffles from lanes outside the mask
//   cp.async      a destination is NaN from issue to wait, when the copy is made: the latest moment that a GPU allows;
//                 copies still under way when the thread ends
//   shared        NaN at the start of a block; bounds of every array (writes beyond when the block ends); sizes as the
//                 target's limit and the opt-in above 48 KB allow
//   global        when buffers are registered (control.h): exact bounds, alignment, and two threads that touch a byte,
//                 one of them writing, in different blocks or with no barrier between
//
// Only load, store, load_16, store_16 and cp_async16 are seen in global memory. What plain C++ does, such as a[i] on
// shared arrays, is the sanitizers' to watch: the build variants asan and tsan (build.py). TSan is told of barriers and
// __syncwarp alone: what passes between threads without one is a race to it, and so is anything between two blocks.
//
// A warp carries out one operation at a time: two halves with masks of their own at once count as diverged.
// Not modelled: weak memory ordering, the order of a real mma's additions, __threadfence and protocols between blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "llmbuilder/dtype.h"
#include "recorder.h"

// ------------------------------------------------------------------------------------------------------- CUDA's names

struct uint3 {
  unsigned x, y, z;
};

#define __global__
#define __launch_bounds__(...)
#define DEVICE inline
#define HD inline

#define threadIdx (gpusim::self->index)
#define blockIdx (gpusim::self->block)
#define blockDim (gpusim::self->block_size)
#define gridDim (gpusim::self->grid_size)

#define SHARED(name, ...)                                       \
  using name##_shared_type = __VA_ARGS__;                       \
  static char name##_shared_site;                               \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      gpusim::static_shared(&name##_shared_site, #name, sizeof(name##_shared_type), alignof(name##_shared_type)))
#define DYN_SMEM(name) unsigned char* name = static_cast<unsigned char*>(gpusim::dynamic_shared())

#define __syncthreads() gpusim::barrier(__FILE__, __LINE__)

// ----------------------------------------------------------------------------------------------- the emulator's inside

namespace gpusim {

struct Thread {
  uint3 index, block;
  dim3 block_size, grid_size;
  int number, lane, warp;  // number: of the thread in its block
};
extern Thread* self;  // the running one

void barrier(const char* file, int line);
void* dynamic_shared();
void* static_shared(const void* site, const char* name, size_t bytes, size_t alignment);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// Checks and counts an access of the running thread.
enum Access { READ, WRITE };
void touch(Access, const void* address, size_t bytes, size_t alignment);

enum Operation { SYNCWARP, SHUFFLE, MMA_BF16, MMA_F16, MMA_TF32, LDMATRIX, LDMATRIX_TRANS };
/// The running lane has arrived with its operand; returns when all lanes of the mask have and the operation is done.
void collective(Operation, uint32_t mask, void* operand);

struct ShuffleOperand {
  uint64_t value, result;
  int source;
};
struct MmaOperand {
  float* d;
  const uint32_t *a, *b;
};
struct LdmatrixOperand {
  uint32_t row[4];
  uint32_t* words;
  uintptr_t address;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};
void begin_copy(void* to, const void* from);
void commit_copies();
bool finish_copy(int pending, Copy* copy);  // the next that must be made before at most `pending` groups are under way

}  // namespace gpusim

inline void __syncwarp(uint32_t mask = ~0u) { gpusim::collective(gpusim::SYNCWARP, mask, nullptr); }

namespace gpusim {

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  ShuffleOperand operand{0, 0, source};
  memcpy(&operand.value, &value, sizeof(T));
  collective(SHUFFLE, mask, &operand);
  memcpy(&value, &operand.result, sizeof(T));
  return value;
}

}  // namespace gpusim

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return gpusim::shuffle(mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return gpusim::shuffle(mask, value, (gpusim::self->lane ^ lanes) & 31);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance) {
  const int lane = gpusim::self->lane, source = lane + int(distance);
  return gpusim::shuffle(mask, value, source < 32 ? source : lane);
}

// ---------------------------------------------------------------------------------------------- the names of device.h

namespace gpusim::device {

using llmbuilder::bf16;
using llmbuilder::f16;

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat(float value);

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(f16 value) { return half_to_float(value.bits); }

template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {float_to_bfloat(value)};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {float_to_half(value)};
  } else {
    return value;
  }
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

template <class T>
T load(const T* p) {
  touch(READ, p, sizeof(T), sizeof(T));
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}
template <class T>
void store(T* p, typename std::common_type<T>::type value) {
  touch(WRITE, p, sizeof(T), sizeof(T));
  memcpy(p, &value, sizeof(T));
}

template <class T>
T* in_global(T* p) {
  return p;
}

inline void load_16(const void* p, uint32_t* words) {
  touch(READ, p, 16, 16);
  memcpy(words, p, 16);
}
inline void store_16(void* p, const uint32_t* words) {
  touch(WRITE, p, 16, 16);
  memcpy(p, words, 16);
}

inline void cp_async16(void* shared, const void* global, bool valid) {
  touch(WRITE, shared, 16, 16);
  if (valid) touch(READ, global, 16, 16);
  memset(shared, 0xff, 16);  // in this file, where the sanitizers see it
  begin_copy(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { commit_copies(); }
template <int N>
void cp_async_wait() {
  for (Copy copy; finish_copy(N, &copy);) {
    if (copy.from) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
}

inline void ldmatrix(Operation operation, uint32_t (&words)[4], const void* row) {
  touch(READ, row, 16, 16);
  LdmatrixOperand operand{{}, words, reinterpret_cast<uintptr_t>(row)};
  memcpy(operand.row, row, 16);
  collective(operation, ~0u, &operand);
}
inline void ldmatrix_x4(uint32_t (&words)[4], const void* row) { ldmatrix(LDMATRIX, words, row); }
inline void ldmatrix_x4_trans(uint32_t (&words)[4], const void* row) { ldmatrix(LDMATRIX_TRANS, words, row); }

inline void mma(Operation operation, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperand operand{d, a, b};
  collective(operation, ~0u, &operand);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(MMA_BF16, d, a, b); }
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(MMA_F16, d, a, b); }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(MMA_TF32, d, a, b); }

}  // namespace gpusim::device

// ----------------------------------------------------------------------------------------------- what launchers may do

namespace gpusim {

/// Calls a kernel with the arguments of a launch, for the running thread.
template <class... Parameters, size_t... I>
void call(const void* kernel, void** arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Parameters...)>(kernel)(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
}

/// Makes a kernel known to the runtime; a launcher does so before it asks anything of it.
template <class... Parameters>
void register_kernel(void (*kernel)(Parameters...), const char* name) {
  recorder::register_kernel(reinterpret_cast<const void*>(kernel), name, [](const void* known, void** arguments) {
    call<Parameters...>(known, arguments, std::index_sequence_for<Parameters...>());
  });
}

}  // namespace gpusim
