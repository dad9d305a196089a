// Eight elements of a row as floats: what a thread of an elementwise kernel works on, and what a Philox call decides.
#pragma once
#include "cuda/device.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {

HD bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// f(T()) for the type that `dtype` names.
template <class F>
Status with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::bf16:
      return f(bf16());
    case DType::f16:
      return f(f16());
  }
  return Status::refused("no such dtype: " + std::to_string(int(dtype)));
}

/// The elements of a 16-byte vector, in both directions.
template <class T>
DEVICE void unpack(const uint32_t (&words)[4], float* values) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      values[i] = as_float(words[i]);
    } else {
      values[2 * i] = to_float(from_bits<T>(words[i] & 0xffffu));
      values[2 * i + 1] = to_float(from_bits<T>(words[i] >> 16));
    }
  }
}
template <class T>
DEVICE void pack(const float* values, uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      words[i] = as_uint(values[i]);
    } else {
      words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
  }
}

/// values = p[0 ... valid), zeros behind them; nothing beyond is read. `vector`: p is a multiple of 16 bytes.
template <class T>
DEVICE void load_floats(const T* p, int valid, bool vector, float (&values)[8]) {
  if (vector && valid == 8) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 8; i += 16 / sizeof(T)) {
      load_16(p + i, words);
      unpack<T>(words, values + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = i < valid ? to_float(load(p + i)) : 0.0f;
  }
}

/// p[0 ... valid) = values, rounded to nearest; nothing beyond is written.
template <class T>
DEVICE void store_floats(T* p, int valid, bool vector, const float (&values)[8]) {
  if (vector && valid == 8) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 8; i += 16 / sizeof(T)) {
      pack<T>(values + i, words);
      store_16(p + i, words);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < valid) store(p + i, from_float<T>(values[i]));
  }
}

}  // namespace llmbuilder::gpu
