// Element types that the kernels know. The numbers are part of the Python interface.
#pragma once
#include <cstdint>

namespace llmbuilder {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

/// Sixteen bits with the meaning of a bfloat16 or of an IEEE half; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace llmbuilder
