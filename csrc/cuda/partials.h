// Sums that several blocks share: each leaves its part in the workspace, and a second launch adds the parts in order.
// No atomics, so equal inputs give equal bits; no block waits for another, so nothing depends on how memory is ordered.
#pragma once
#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace llmbuilder::gpu {

/// `size` rows or columns in `parts` of `length`, the last one shorter; at least one part, though it be empty.
struct Cut {
  int64_t length, parts;

  /// About `wanted` parts, none shorter than `least`, their length a multiple of `step`: by the shape alone.
  static Cut into(int64_t size, int64_t wanted, int64_t least, int64_t step) {
    const int64_t most = size / least, parts = wanted < most ? wanted : most;
    const int64_t length = parts > 1 ? (size + parts - 1) / parts : size;
    const int64_t whole = length < step ? step : (length + step - 1) / step * step;
    return {whole, size > whole ? (size + whole - 1) / whole : 1};
  }
};

/// Bytes of the workspace that serves every run in turn, where one run for some ranks leaves floats(size, ranks) in it;
/// `size` is an element's, as a type.
template <class F>
int64_t workspace_of_runs(DType dtype, int64_t rank, F floats) {
  const auto of_size = [&](auto size) {
    int64_t most = 0;
    (void)each_run<size>(rank, [&](int64_t, int64_t ranks) {
      const int64_t some = floats(size, ranks);
      most = some > most ? some : most;
      return Status();
    });
    return most * int64_t(sizeof(float));
  };
  return dtype == DType::f32 ? of_size(std::integral_constant<int, 4>()) : of_size(std::integral_constant<int, 2>());
}

/// out[i, j] = scale * the sum of partials[0 ... parts)[i, j].
template <class T>
struct PartialSums {
  const float* partials;  // [parts, rows, columns]
  int64_t parts, rows, columns;
  float scale;
  T* out;
  int64_t out_stride;

  HD int64_t size() const { return rows * columns; }
  DEVICE void add_up(int64_t i) const {
    float sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += load(partials + part * size() + i);
    store(out + i / columns * out_stride + i % columns, from_float<T>(scale * sum));
  }
};

constexpr int ADD_UP_THREADS = 256;

/// A thread an element.
template <class T>
__global__ void __launch_bounds__(ADD_UP_THREADS) add_up_kernel(PartialSums<T> sums) {
  const int64_t i = int64_t(blockIdx.x) * ADD_UP_THREADS + threadIdx.x;
  if (i < sums.size()) sums.add_up(i);
}

/// Elements of the first sums and then of the second.
template <class T, class U>
__global__ void __launch_bounds__(ADD_UP_THREADS) add_up_both_kernel(PartialSums<T> first, PartialSums<U> second) {
  const int64_t i = int64_t(blockIdx.x) * ADD_UP_THREADS + threadIdx.x;
  if (i < first.size()) {
    first.add_up(i);
  } else if (i - first.size() < second.size()) {
    second.add_up(i - first.size());
  }
}

inline Blocks add_up_grid(int64_t size) { return (size + ADD_UP_THREADS - 1) / ADD_UP_THREADS; }

}  // namespace llmbuilder::gpu
