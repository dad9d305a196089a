// Cross-entropy of a chunk of logits, and its gradient in their place. A block takes a row: one sweep for the largest
// logit and the sum of exponentials, rescaled whenever a larger one turns up (Milakov, Gimelshein 2018, arXiv
// 1805.02867), and a second, whose reads mostly hit the L2 cache, for the gradient.
// Traffic: the logits read twice and written once; once read where no gradient is wanted.
#include "cuda/check.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

constexpr int THREADS = 512;
constexpr int BLOCKS = 3;                 // an SM must have registers for, so that enough loads are under way
constexpr float LOWEST = -3.4028235e38f;  // finite, so that columns of -inf count nothing instead of making NaN

/// The sum of e^z over some columns as total * e^largest, and the first column where z is largest.
struct Softmax {
  float largest, total;
  int32_t column;
};

/// Of the columns of both.
struct Join {
  DEVICE Softmax operator()(const Softmax& a, const Softmax& b) const {
    const float largest = fmaxf(a.largest, b.largest);
    const float total = a.total * expf(a.largest - largest) + b.total * expf(b.largest - largest);
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.column < b.column);
    return {largest, total, first ? a.column : b.column};
  }
};

/// z = cap * tanh(x / cap) and dz/dx; without a cap (0) x itself.
struct Capped {
  float z, slope;

  DEVICE Capped(float x, float cap) : z(x), slope(1) {
    if (cap == 0) return;
    // with u = e^(-2|x/cap|): tanh = (1 - u) / (1 + u), its derivative 4u / (1 + u)^2; neither cancels
    const float t = -2 / cap * fabsf(x), u = expf(t), whole = 1 + u;
    z = copysignf(cap * (-expm1f(t) / whole), x);
    slope = 4 * u / (whole * whole);
  }
};

/// A row of logits as the threads of a block share it: thread i takes every THREADS-th eight columns from the i-th on.
template <class T>
struct Row {
  T* logits;
  int64_t columns;
  float softcap;
  bool vector;

  /// f(first column, how many, their logits as float)
  template <class F>
  DEVICE void each_eight(F f) const {
    for (int64_t first = 8 * threadIdx.x; first < columns; first += 8 * THREADS) {
      const int valid = int(columns - first < 8 ? columns - first : 8);
      float x[8];
      load_floats(logits + first, valid, vector, x);
      f(first, valid, x);
    }
  }
};

template <class T>
DEVICE Softmax softmax_of(const Row<T>& row) {
  Softmax sum{LOWEST, 0, 0};
  row.each_eight([&](int64_t first, int valid, const float (&x)[8]) {
    float z[8], top = sum.largest;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      z[i] = i < valid ? Capped(x[i], row.softcap).z : -INFINITY;
      if (z[i] > top) {
        top = z[i];
        sum.column = int32_t(first) + i;
      }
    }
    if (top > sum.largest) {
      sum.total *= expf(sum.largest - top);
      sum.largest = top;
    }
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; i++) part[i] = expf(z[i] - top);
    sum.total += ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  });
  return sum;
}

/// The gradient of weight * loss in the logits' place: weight * (softmax - 1 at the target) * dz/dx.
template <class T>
DEVICE void differentiate(const Row<T>& row, const Softmax& softmax, int64_t target, float weight) {
  const float inverse = 1 / softmax.total;
  row.each_eight([&](int64_t first, int valid, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Capped capped(x[i], row.softcap);
      const float p = expf(capped.z - softmax.largest) * inverse;
      x[i] = weight * (first + i == target ? p - 1 : p) * capped.slope;
    }
    store_floats(row.logits + first, valid, row.vector, x);
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    cross_entropy_kernel(T* logits, int64_t stride, int64_t columns, const int64_t* targets, const float* row_weights,
                         float softcap, bool need_grad, bool vector, float* losses, int64_t* predictions) {
  SHARED(shared, Softmax[THREADS / WARP]);
  const int64_t i = blockIdx.x, target = load(targets + i);
  const Row<T> row{logits + i * stride, columns, softcap, vector};
  const float at_target = Capped(to_float(load(row.logits + target)), softcap).z;  // before anybody writes there
  const Softmax softmax = block_reduce<THREADS>(softmax_of(row), shared, Join());
  const float loss = logf(softmax.total) + (softmax.largest - at_target);
  if (threadIdx.x == 0) {
    store(losses + i, loss);
    store(predictions + i, int64_t(softmax.column));
  }
  if (need_grad) differentiate(row, softmax, target, row_weights ? load(row_weights + i) : 1.0f);
}

}  // namespace

Status softmax_cross_entropy(const Launch& launch, DType dtype, Matrix logits, const int64_t* targets,
                             const float* row_weights, float softcap, bool need_grad, float* losses,
                             int64_t* predictions) {
  const int64_t rows = logits.rows, columns = logits.columns, stride = logits.stride;
  Check check("softmax_cross_entropy");
  check.that(rows <= 0 || (columns >= 1 && columns <= INT32_MAX),
             "logits have 1 to 2^31 - 1 columns, not " + std::to_string(columns));
  check.matrix("logits", logits, rows, columns).blocks(rows).pointer("targets", targets, rows > 0);
  check.pointer("losses", losses, rows > 0).pointer("predictions", predictions, rows > 0);
  if (!check.status() || rows == 0) return check.status();
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool vector = aligned(logits.data) && stride * sizeof(T) % 16 == 0;
    return LAUNCH(cross_entropy_kernel<T>, unsigned(rows), THREADS, 0, launch, static_cast<T*>(logits.data), stride,
                  columns, targets, row_weights, softcap, need_grad, vector, losses, predictions);
  });
}

}  // namespace llmbuilder::gpu
