// Cross-entropy of a chunk of logits, and its gradient in their place.
#pragma once
#include "llmbuilder/dtype.h"

namespace llmbuilder {

/// With z = softcap * tanh(logits / softcap), or z = logits where softcap is 0, for each row:
///   losses      = logsumexp(z) - z[target]
///   predictions = the first column of the row's largest z
///   logits      = row_weight * (softmax(z) - onehot(target)) * dz/dlogits, in place, when `need_grad`
/// logits: [rows, columns] of `dtype`, contiguous, columns >= 1. targets, losses, predictions: [rows].
/// row_weights: [rows], or null for ones. Arithmetic in float, sums of blocks in double; infinities and NaN go through
/// as in the formula.
using SoftmaxCrossEntropy = void(DType dtype, void* logits, int64_t rows, int64_t columns, const int64_t* targets,
                                 const float* row_weights, float softcap, bool need_grad, float* losses,
                                 int64_t* predictions, int threads);

}  // namespace llmbuilder
