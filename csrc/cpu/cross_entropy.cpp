#include "llmbuilder/cross_entropy.h"

#include <math.h>

#include "isa.h"
#include "vec.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr int BLOCK = 1024;  // columns that are in the first cache, as float, while they are worked on

/// e^x = scale * (1 + rest), for x of at most 88; exact scale, rest right to its last bits (which tanh needs).
struct Exponential {
  static constexpr float LOWEST = -87.0f;  // below, e^x is 0
  V scale, rest;

  explicit Exponential(V x) {
    x = x < LOWEST ? broadcast(LOWEST) : x;  // NaN stays
    // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
    const V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    // ln 2 in two parts, the first short enough for n times it to be exact
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    scale = (V)(((W)shifted + 127) << 23);
    rest = r + r * r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040))))));
  }
};

inline V exponential(V x) {
  const Exponential e(x);
  return x < Exponential::LOWEST ? V{} : e.scale * e.rest + e.scale;
}

inline V tangent(V x) {  // tanh
  const W sign = (W)x & 0x80000000u;
  const Exponential e((V)((W)x | 0x80000000u) * 2.0f);
  const V minus_one = e.scale * e.rest + (e.scale - 1.0f);  // e^(-2|x|) - 1
  return (V)((W)(-minus_one / (minus_one + 2.0f)) | sign);
}

template <class T>
struct Row {
  T* logits;
  i64 columns;
  float softcap;

  /// Columns from `first` on into `z`, the end padded with -inf to whole vectors; returns how many there are.
  int read(i64 first, float* z) const {
    const int n = (int)least<i64>(BLOCK, columns - first);
    for (int c = 0; c < n; c += LANES) {
      const int some = least(LANES, n - c);
      const T* from = logits + first + c;
      const V v = some == LANES ? load(from) : load_first(from, some);
      store(z + c, softcap == 0 ? v : tangent(v * (1.0f / softcap)) * softcap);
      for (int pad = some; pad < LANES; pad++) z[c + pad] = -INFINITY;
    }
    return n;
  }

  /// One column as `read` gives it.
  float at(i64 column) const {
    const V v = broadcast(to_float(logits[column]));
    return softcap == 0 ? v[0] : (tangent(v * (1.0f / softcap)) * softcap)[0];
  }
};

/// Σ e^z = total * e^largest
struct Softmax {
  float largest = -3.4028235e38f;  // finite, so that columns of -inf count nothing instead of making NaN
  double total = 0;
  i64 largest_block = 0;

  /// One pass: the sum so far is rescaled whenever a block has a larger z.
  template <class T>
  explicit Softmax(const Row<T>& row) {
    float z[BLOCK];
    for (i64 first = 0; first < row.columns; first += BLOCK) {
      const int n = row.read(first, z);
      const float top = largest_of(z, n);
      if (top > largest) {
        total *= exp(double(largest) - top);
        largest = top;
        largest_block = first;
      }
      V sums = {};
      for (int c = 0; c < n; c += LANES) sums += exponential(load(z + c) - largest);
      total += sum(sums);
    }
  }

  template <class T>
  i64 prediction(const Row<T>& row) const {
    float z[BLOCK];
    const int n = row.read(largest_block, z);
    for (int c = 0; c < n; c++)
      if (z[c] == largest) return largest_block + c;
    return largest_block;
  }

 private:
  static float largest_of(const float* z, int n) {
    V top = load(z);
    for (int c = LANES; c < n; c += LANES) {
      const V v = load(z + c);
      top = v > top ? v : top;
    }
    float result = top[0];
    for (int i = 1; i < LANES; i++) result = most(result, top[i]);
    return result;
  }
};

/// The gradient of weight * loss in the logits' place.
template <class T>
void differentiate(const Row<T>& row, const Softmax& softmax, i64 target, float loss, float weight) {
  const float cap = row.softcap, to_slope = cap == 0 ? 0 : 1 / cap, factor = float(weight / softmax.total);
  const auto slope = [=](auto z) { return 1.0f - (z * to_slope) * (z * to_slope); };  // dz/dlogits
  // p - 1 without the cancellation; taken before the logits are overwritten
  const float at_target = float(expm1(-double(loss))) * weight * slope(row.at(target));
  float z[BLOCK];
  for (i64 first = 0; first < row.columns; first += BLOCK) {
    const int n = row.read(first, z);
    for (int c = 0; c < n; c += LANES) {
      const V v = load(z + c);
      V grad = exponential(v - softmax.largest) * factor;
      if (cap != 0) grad *= slope(v);
      if (n - c >= LANES) {
        store(row.logits + first + c, grad);
      } else {
        store_first(row.logits + first + c, grad, n - c);
      }
    }
  }
  from_float(at_target, row.logits + target);
}

template <class T>
void run(T* logits, i64 rows, i64 columns, const i64* targets, const float* row_weights, float softcap, bool need_grad,
         float* losses, i64* predictions, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(rows * columns, threads))
  for (i64 i = 0; i < rows; i++) {
    const Row<T> row{logits + i * columns, columns, softcap};
    const Softmax softmax(row);
    losses[i] = float(log(softmax.total) + (double(softmax.largest) - row.at(targets[i])));
    predictions[i] = softmax.prediction(row);
    if (need_grad) differentiate(row, softmax, targets[i], losses[i], row_weights ? row_weights[i] : 1.0f);
  }
}

}  // namespace

void softmax_cross_entropy(DType dtype, void* logits, int64_t rows, int64_t columns, const int64_t* targets,
                           const float* row_weights, float softcap, bool need_grad, float* losses, int64_t* predictions,
                           int threads) {
  dispatch(dtype, [&](auto* type) {
    run((decltype(type))logits, rows, columns, targets, row_weights, softcap, need_grad, losses, predictions, threads);
  });
}

}  // namespace llmbuilder::LLMBUILDER_ISA
