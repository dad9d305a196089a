// Products of a warp, of every type, in one layout: Math::mma computes D[16, 8] += A[16, k] B[k, 8] with the operands
// of device.h, in words of 32 bits, which are two elements of bf16 or f16 (k = 16) or one of fp32 (k = 8). Lane (g, t)
// = (lane / 4, lane % 4) holds
//
//     A   words t and t + 4 of rows g and g + 8     a[0] = (g, t)       a[1] = (g + 8, t)
//                                                   a[2] = (g, t + 4)   a[3] = (g + 8, t + 4)
//     B   words t and t + 4 of column g             b[0], b[1]
//     D   columns 2t and 2t + 1 of row g            d[0], d[1]
//                               of row g + 8        d[2], d[3]
//
// A sum does not care for the order of its terms, so long as A and B agree on it. So k is permuted inside each 32:
//
//     columns   0 ... 7   8 ... 15   16 ... 23   24 ... 31
//     lane t    0         1          2           3           as an Eight: eight columns of a row, one after another
//
// An Eight is one 16-byte load (two for fp32), and what one Philox call decides. Its words 2h and 2h + 1 are the
// operands of step h, which the hardware takes for words t and t + 4: that is the permutation.
#pragma once
#include "cuda/device.h"
#include "cuda/mask.h"
#include "llmbuilder/cuda.h"
#include "llmbuilder/dtype.h"

namespace llmbuilder::gpu {

constexpr int MMA_ROWS = 16, MMA_COLUMNS = 8;  // of D
constexpr int DEPTH = 32;                      // columns that a quad of lanes owns, eight each: the depth of multiply()

/// Eight consecutive elements of a row.
template <class T>
struct Eight {
  static constexpr int PACKED = 4 / sizeof(T), WORDS = 8 / PACKED;
  uint32_t word[WORDS];

  /// p[0 ... valid) and zeros behind them; nothing beyond is read. `vector`: p is a multiple of 16 bytes, and valid is
  /// either 8 or more, or 0 or less.
  DEVICE static Eight load(const T* p, int64_t valid, bool vector) {
    Eight eight = {};
    if (vector) {
      if (valid > 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) load_16(p + i * PACKED, eight.word + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i < valid) eight.set(i, gpu::load(p + i));
      }
    }
    return eight;
  }

  /// p[0 ... valid) = the first elements; nothing beyond is written. `vector` as for load().
  DEVICE void store(T* p, int64_t valid, bool vector) const {
    if (vector) {
      if (valid > 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) store_16(p + i * PACKED, word + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i < valid) gpu::store(p + i, get(i));
      }
    }
  }

  /// Values rounded to nearest.
  DEVICE static Eight of(const float (&values)[8]) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if constexpr (PACKED == 1) {
        eight.word[i] = bits_of(values[i]);
      } else {
        eight.word[i] = pack<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    return eight;
  }

  DEVICE void set(int i, T value) {
    const uint32_t bits = bits_of(value);
    if constexpr (PACKED == 1) {
      word[i] = bits;
    } else {
      word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | bits << 16 : (word[i / 2] & 0xffff0000u) | bits;
    }
  }
  DEVICE T get(int i) const { return from_bits<T>(PACKED == 1 ? word[i] : word[i / 2] >> (16 * (i % 2)) & 0xffffu); }

  /// Zero where the mask drops, whatever was there.
  DEVICE void drop(const Keep& keep) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) word[i] = PACKED == 2 ? word[i] & keep.pair(i) : keep(i) ? word[i] : 0;
  }
};

/// A matrix as a kernel reads it by Eights. `vector`: its pointer and its row stride are multiples of 16 bytes, and its
/// columns of 8.
template <class T>
struct View {
  const T* at;
  int64_t rows, columns, stride;
  bool vector;

  /// Columns column ... column + 7 of a row; zeros outside the matrix.
  DEVICE Eight<T> eight(int64_t row, int64_t column) const {
    return Eight<T>::load(at + row * stride + column, row < rows ? columns - column : 0, vector);
  }
};

template <class T>
bool aligned(const ConstMatrix& m) {
  return (reinterpret_cast<uintptr_t>(m.data) | uintptr_t(m.stride) * sizeof(T)) % 16 == 0 && m.columns % 8 == 0;
}

template <class T>
View<T> view(const ConstMatrix& m) {
  return {static_cast<const T*>(m.data), m.rows, m.columns, m.stride, aligned<T>(m)};
}

/// out[0 ... valid) of one row = values (+ bias) (+ what is there), rounded once.
template <class T>
DEVICE void write_eight(T* out, const T* bias, bool accumulate, int64_t valid, bool vector, float (&values)[8]) {
  const auto add = [&](const T* terms) {
    const Eight<T> eight = Eight<T>::load(terms, valid, vector);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] += to_float(eight.get(i));
  };
  if (bias) add(bias);
  if (accumulate) add(out);
  Eight<T>::of(values).store(out, valid, vector);
}

struct MathBF16 {
  using Element = bf16;
  static constexpr bool FMA = false;
  DEVICE static uint32_t operand(uint32_t word) { return word; }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
};

struct MathF16 {
  using Element = f16;
  static constexpr bool FMA = false;
  DEVICE static uint32_t operand(uint32_t word) { return word; }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
};

/// Operands are rounded to a mantissa of ten bits: only where the caller's settings allow it.
struct MathTF32 {
  using Element = float;
  static constexpr bool FMA = false;
  DEVICE static uint32_t operand(uint32_t word) { return round_to_tf32(word); }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k8_tf32(d, a, b); }
};

/// FMA in the layout of m16n8k8: a lane fetches what its D needs from the lanes that hold it, 32 shuffles for 32 FMA.
/// For the skinny products alone: beside a base product by FMA even that is little.
struct MathFP32 {
  using Element = float;
  static constexpr bool FMA = true;
  DEVICE static uint32_t operand(uint32_t word) { return word; }
  DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = threadIdx.x % WARP, row = lane / 4 * 4, column = lane % 4 * 8;  // first lanes of the quads asked
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const float upper = fetch(a[2 * half], row + t), lower = fetch(a[2 * half + 1], row + t);
        const float left = fetch(b[half], column + t), right = fetch(b[half], column + 4 + t);
        d[0] = fmaf(upper, left, d[0]);
        d[1] = fmaf(upper, right, d[1]);
        d[2] = fmaf(lower, left, d[2]);
        d[3] = fmaf(lower, right, d[3]);
      }
    }
  }

 private:
  DEVICE static float fetch(uint32_t word, int lane) { return as_float(__shfl_sync(~0u, word, lane)); }
};

/// Calls f with the Math for products of this type, as f(MathBF16()), and returns what it returns.
template <class F>
Status with_math(DType dtype, bool tf32, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(MathBF16());
    case DType::f16:
      return f(MathF16());
    case DType::f32:
      return tf32 ? f(MathTF32()) : f(MathFP32());
  }
  return Status::refused("no kernels for dtype " + std::to_string(int(dtype)));
}

/// Eight elements as mma takes them.
template <class Math>
DEVICE Eight<typename Math::Element> operand(Eight<typename Math::Element> eight) {
#pragma unroll
  for (uint32_t& word : eight.word) word = Math::operand(word);
  return eight;
}

/// d[16, 8] += A[16, 32] B[32, 8], where this lane owns Eights of A's rows g (`upper`) and g + 8 (`lower`), and of B's
/// column g; all as operand() made them. In fp32 the 32 terms are summed by themselves first: one long chain of
/// additions would lose digits.
template <class Math>
DEVICE void multiply(float (&d)[4], const Eight<typename Math::Element>& upper,
                     const Eight<typename Math::Element>& lower, const Eight<typename Math::Element>& column) {
  float part[4] = {};
  float (&sums)[4] = Math::FMA ? part : d;
#pragma unroll
  for (int i = 0; i < Eight<typename Math::Element>::WORDS; i += 2) {
    const uint32_t a[4] = {upper.word[i], lower.word[i], upper.word[i + 1], lower.word[i + 1]};
    const uint32_t b[2] = {column.word[i], column.word[i + 1]};
    Math::mma(sums, a, b);
  }
  if constexpr (Math::FMA) {
#pragma unroll
    for (int h = 0; h < 4; h++) d[h] += part[h];
  }
}

}  // namespace llmbuilder::gpu
