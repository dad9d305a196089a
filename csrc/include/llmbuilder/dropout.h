// Dropout with a counter-based mask (Srivastava et al. 2014, JMLR 15). The backward pass is the same call on the
// gradient.
#pragma once
#include "llmbuilder/dtype.h"
#include "llmbuilder/philox.h"

namespace llmbuilder {

/// y = keep * x * 65536 / (65536 - threshold), computed in float and rounded once.
/// x, y: [rows, columns], contiguous, of `dtype`; they may be the same memory. rows < 2^32, columns < 2^35.
using Dropout = void(DType dtype, const void* x, void* y, int64_t rows, int64_t columns, MaskKey key, int threads);

/// keep[rows, columns] = 1 where the mask keeps and 0 where it drops.
using DropoutMask = void(uint8_t* keep, int64_t rows, int64_t columns, MaskKey key, int threads);

}  // namespace llmbuilder
