// One binary for every processor: how the kernels are compiled and chosen.
//
// Every source in KERNEL_SOURCES of CMakeLists.txt is compiled once for each instruction set, with -DLLMBUILDER_ISA=
// avx512_bf16, avx512, avx2 or plain and the flags for it, and lives in the namespace llmbuilder::LLMBUILDER_ISA.
// `kernels()` returns the table of the best set that this processor has, or of the one that LLMBUILDER_ISA
// (environment) or `set_isa` names.
//
// To add an operator:
//   1. declare its function type, with its meaning, in csrc/include/llmbuilder/<name>.h  (using Name = void(...);)
//   2. add a line to LLMBUILDER_KERNELS below
//   3. define the function in csrc/cpu/<name>.cpp in the namespace llmbuilder::LLMBUILDER_ISA, and list that source
//   4. bind it in csrc/bindings.cpp
//
// Rules for those sources, checked by tests/ops/test_native.py:
//   - No inline function or template of another namespace may be emitted: the linker keeps one copy of such a function
//     for all objects, and it could be the one with AVX-512 instructions. So no standard containers or algorithms: own
//     helpers are in vec.h and workspace.h, and file-local ones in an unnamed namespace.
//   - Work is cut by shape alone, never by the number of threads, so that sums have the same bits for any number.
//   - `threads` goes to num_threads(); nothing asks OpenMP how many there are.
#pragma once
#include "llmbuilder/cross_entropy.h"
#include "llmbuilder/dropout.h"
#include "llmbuilder/dtype.h"
#include "llmbuilder/ewc.h"
#include "llmbuilder/lora.h"
#include "llmbuilder/philox.h"

#define LLMBUILDER_KERNELS(KERNEL)      \
  KERNEL(Philox, philox)                \
  KERNEL(Dropout, dropout)              \
  KERNEL(DropoutMask, dropout_mask)     \
  KERNEL(LoraShrink, lora_shrink)       \
  KERNEL(LoraExpand, lora_expand)       \
  KERNEL(LoraGradSB, lora_grad_sb)      \
  KERNEL(LoraGradAX, lora_grad_ax)      \
  KERNEL(EwcPenalty, ewc_penalty)       \
  KERNEL(EwcAccumulate, ewc_accumulate) \
  KERNEL(SoftmaxCrossEntropy, softmax_cross_entropy)

namespace llmbuilder {

/// The kernels of one instruction set.
struct Kernels {
#define KERNEL(Type, name) Type* name;
  LLMBUILDER_KERNELS(KERNEL)
#undef KERNEL
};

/// The table in use. Throws std::invalid_argument when LLMBUILDER_ISA names a set that does not fit.
const Kernels& kernels();
/// Name of the set in use.
const char* isa();
/// Name of the index-th set that this build has and this processor can run, best first; null past the last.
const char* available_isa(int index);
/// Uses another set from now on. Throws std::invalid_argument when it is unknown or unfit.
void set_isa(const char* name);

}  // namespace llmbuilder

#ifdef LLMBUILDER_ISA
namespace llmbuilder::LLMBUILDER_ISA {
#define KERNEL(Type, name) Type name;
LLMBUILDER_KERNELS(KERNEL)
#undef KERNEL
}  // namespace llmbuilder::LLMBUILDER_ISA
#endif
