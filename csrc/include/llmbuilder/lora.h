// The skinny products of a LoRA layer (Hu et al. 2021, arXiv 2106.09685) around its frozen product.
//
//   forward    S = drop(x) A^T          y += scaling S B^T
//   backward   dS = scaling dY B        dB = scaling dY^T S        dA = dS^T drop(x)        dX += drop'(dS A)
//
// drop(x) = keep * x * 65536 / (65536 - threshold), with the mask of philox.h; drop' is the same factor. Matrices are
// contiguous: x, dX [M, K]; y, dY [M, N]; A [r, K]; B [N, r]; S, dS [M, r], all of one dtype; dA and dB are float.
// M, N, K >= 0, r >= 1. Products take their operands as they are and are summed in float, in an order that depends on
// the shape alone. Nothing the size of x or y is allocated.
#pragma once
#include "llmbuilder/dtype.h"
#include "llmbuilder/philox.h"

namespace llmbuilder {

/// S = drop(x) A^T.
using LoraShrink = void(DType dtype, const void* x, const void* A, void* S, int64_t M, int64_t K, int64_t r,
                        MaskKey key, int threads);

/// y += scaling S B^T, in place.
using LoraExpand = void(DType dtype, void* y, const void* S, const void* B, int64_t M, int64_t N, int64_t r,
                        float scaling, int threads);

/// dS = scaling dY B and dB = scaling dY^T S, in one pass over dY.
using LoraGradSB = void(DType dtype, const void* dY, const void* S, const void* B, void* dS, float* dB, int64_t M,
                        int64_t N, int64_t r, float scaling, int threads);

/// dA = dS^T drop(x) and, unless dX is null, dX += drop'(dS A) in place: one pass, the mask drawn once.
using LoraGradAX = void(DType dtype, const void* x, const void* dS, const void* A, float* dA, void* dX, int64_t M,
                        int64_t K, int64_t r, MaskKey key, int threads);

}  // namespace llmbuilder
