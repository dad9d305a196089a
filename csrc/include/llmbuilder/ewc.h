// Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), over many tensors in one pass.
#pragma once
#include "llmbuilder/dtype.h"

namespace llmbuilder {

/// Returns strength/2 sum F (theta - anchor)^2 and adds its gradient strength F (theta - anchor) to grad.
/// params, anchors, fishers, grads: `count` addresses of contiguous tensors of `dtype` with sizes[i] elements; a null
/// `fishers` stands for ones. All arithmetic is in double; the gradient is rounded once.
using EwcPenalty = double(DType dtype, int64_t count, const void* const* params, const void* const* anchors,
                          const void* const* fishers, void* const* grads, const int64_t* sizes, double strength,
                          int threads);

/// F += weight g^2 in place, in double and rounded once.
using EwcAccumulate = void(DType dtype, int64_t count, void* const* fishers, const void* const* grads,
                           const int64_t* sizes, double weight, int threads);

}  // namespace llmbuilder
