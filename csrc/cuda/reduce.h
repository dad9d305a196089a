// Sums and the like over a block, in an order that the block's size alone decides: equal inputs give equal bits.
#pragma once
#include "cuda/device.h"

namespace llmbuilder::gpu {

/// The value of the lane `distance` further on, word by word: for any trivially copyable type.
template <class T>
DEVICE T shuffle_down(const T& value, int distance) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); i++) words[i] = __shfl_down_sync(~0u, words[i], distance);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

/// The values of all the block's threads, combined two by two: a tree in each warp, then one warp after the other.
/// Every thread calls it and gets the result. `shared` has room for a T of each warp, and is in use until the next
/// barrier.
template <int THREADS, class T, class Combine>
DEVICE T block_reduce(T value, T* shared, Combine combine) {
  static_assert(THREADS % WARP == 0 && THREADS <= 1024, "whole warps");
#pragma unroll
  for (int distance = WARP / 2; distance; distance /= 2) value = combine(value, shuffle_down(value, distance));
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
  __syncthreads();
  T result = shared[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / WARP; warp++) result = combine(result, shared[warp]);
  return result;
}

template <int THREADS>
DEVICE double block_sum(double value, double* shared) {
  return block_reduce<THREADS>(value, shared, [](double a, double b) { return a + b; });
}

}  // namespace llmbuilder::gpu
