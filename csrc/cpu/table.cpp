// The table of this instruction set.
#include "isa.h"

namespace llmbuilder::LLMBUILDER_ISA {

extern const Kernels kernels = {
#define KERNEL(Type, name) name,
    LLMBUILDER_KERNELS(KERNEL)
#undef KERNEL
};

}  // namespace llmbuilder::LLMBUILDER_ISA
