#include "llmbuilder/cross_entropy.h"

#include <math.h>

#include "isa.h"
#include "vec.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr int BLOCK = 1024;      // columns that are in the first cache, as float, while they are worked on
constexpr int STEP = 4 * LANES;  // columns that are summed side by side, for speed and for short sums

/// e^x = scale * (1 + rest), for x of at most 88; exact scale, rest right to its last bits, which tanh needs.
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
    rest =
        r +
        r * r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040))))));
  }
};

inline V exponential(V x) {
  const Exponential e(x);
  return x < Exponential::LOWEST ? V{} : e.scale * e.rest + e.scale;
}

/// z = cap * tanh(x / cap) and dz/dx; without a cap (0) x itself.
struct Capped {
  V z, slope;

  Capped(V x, float cap) : z(x), slope(broadcast(1)) {
    if (cap == 0) return;
    const W sign = (W)x & 0x80000000u;
    const Exponential e((V)((W)x | 0x80000000u) * (2 / cap));
    // tanh |t| = (1 - u) / (1 + u) with u = e^(-2|t|), and its derivative 4 u / (1 + u)^2: neither cancels
    const V u = e.scale * e.rest + e.scale, u_minus_one = e.scale * e.rest + (e.scale - 1.0f);
    z = (V)((W)(u_minus_one / (u + 1.0f) * -cap) | sign);
    slope = 4.0f * u / ((u + 1.0f) * (u + 1.0f));
  }
};

template <class T>
struct Row {
  T* logits;
  i64 columns;
  float softcap;

  /// Capped columns from `first` on into `z`, and their slopes unless null; the end is padded with z of -inf to whole
  /// STEPs. Returns how many columns there are.
  int read(i64 first, float* z, float* slopes = nullptr) const {
    const int n = (int)least<i64>(BLOCK, columns - first);
    for (int c = 0; c < n; c += LANES) {
      const T* from = logits + first + c;
      const Capped capped(n - c >= LANES ? load(from) : load_first(from, n - c), softcap);
      store(z + c, capped.z);
      if (slopes) store(slopes + c, capped.slope);
    }
    for (int c = n; c < round_up(n, STEP); c++) z[c] = -INFINITY;
    return n;
  }

  Capped at(i64 column) const { return Capped(broadcast(to_float(logits[column])), softcap); }
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
      V sums[4] = {};
      for (int c = 0; c < n; c += STEP)
        for (int i = 0; i < 4; i++) sums[i] += exponential(load(z + c + i * LANES) - largest);
      total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
void differentiate(const Row<T>& row, const Softmax& softmax, i64 target, double loss, float weight) {
  // p - 1 without the cancellation; taken before the logits are overwritten
  const float at_target = float(expm1(-loss)) * weight * row.at(target).slope[0];
  const float factor = float(weight / softmax.total);
  float z[BLOCK], slopes[BLOCK];
  for (i64 first = 0; first < row.columns; first += BLOCK) {
    const int n = row.read(first, z, slopes);
    for (int c = 0; c < n; c += LANES) {
      const V grad = exponential(load(z + c) - softmax.largest) * factor * load(slopes + c);
      T* to = row.logits + first + c;
      if (n - c >= LANES) {
        store(to, grad);
      } else {
        store_first(to, grad, n - c);
      }
    }
  }
  from_float(at_target, row.logits + target);
}

template <class T>
void run(T* logits, i64 rows, i64 columns, const i64* targets, const float* row_weights, float softcap, bool need_grad,
         float* losses, i64* predictions, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(rows* columns, threads))
  for (i64 i = 0; i < rows; i++) {
    const Row<T> row{logits + i * columns, columns, softcap};
    const Softmax softmax(row);
    const double loss = log(softmax.total) + (double(softmax.largest) - row.at(targets[i]).z[0]);
    losses[i] = float(loss);
    predictions[i] = softmax.prediction(row);
    if (need_grad) differentiate(row, softmax, targets[i], loss, row_weights ? row_weights[i] : 1.0f);
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
