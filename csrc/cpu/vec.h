// Vectors of the instruction set that is being compiled, and the few helpers that every kernel needs.
//
// V is the compiler's own vector type (GCC, Clang), so arithmetic is written with operators on any processor;
// intrinsics stand only where the compiler does not find the instruction. T is float, bf16 or f16 throughout;
// arithmetic is float.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "llmbuilder/dtype.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float V __attribute__((vector_size(4 * LANES)));
typedef u32 W __attribute__((vector_size(4 * LANES)));
typedef u64 Q __attribute__((vector_size(4 * LANES)));  // LANES / 2
typedef u16 H __attribute__((vector_size(2 * LANES)));
typedef double D __attribute__((vector_size(4 * LANES)));  // LANES / 2
typedef float HalfV __attribute__((vector_size(2 * LANES)));

template <class I>
constexpr I least(I a, I b) {
  return b < a ? b : a;
}
template <class I>
constexpr I most(I a, I b) {
  return a < b ? b : a;
}
constexpr i64 parts_of(i64 n, i64 size) { return (n + size - 1) / size; }
constexpr i64 round_up(i64 n, i64 size) { return parts_of(n, size) * size; }

/// Threads for `elements` elements: waking a team costs more than a small job.
constexpr int team(i64 elements, int threads) { return elements < 16384 ? 1 : most(threads, 1); }

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- one element ----------------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>(u32(x.bits) << 16); }
inline float to_float(f16 x) {
  const u32 exponent = x.bits & 0x7c00u, sign = u32(x.bits & 0x8000u) << 16;
  u32 rest = u32(x.bits & 0x7fffu) << 13;
  if (exponent == 0x7c00u) {
    rest += u32(255 - 31) << 23;  // infinity, NaN
  } else if (exponent == 0) {
    // subnormal: normalise by a subtraction, which works whether or not the processor flushes subnormal floats
    rest = bits_as<u32>(bits_as<float>(rest + (113u << 23)) - bits_as<float>(113u << 23));
  } else {
    rest += u32(127 - 15) << 23;
  }
  return bits_as<float>(rest | sign);
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, bf16* to) {  // round to nearest even
  const u32 u = bits_as<u32>(x);
  to->bits = x != x ? u16(0x7fc0) : u16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16* to) {  // round to nearest even
  const u32 u = bits_as<u32>(x), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  u32 half;
  if (size > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (size >= (143u << 23)) {
    half = 0x7c00;  // 65536 and above
  } else if (size < (113u << 23)) {
    // subnormal half: adding 0.5 leaves its mantissa, rounded, in the low bits
    half = bits_as<u32>(bits_as<float>(size) + 0.5f) - bits_as<u32>(0.5f);
  } else {
    half = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  to->bits = u16(half | sign);
}

// ---- LANES elements -------------------------------------------------------------------------------------------------

inline V broadcast(float x) { return V{} + x; }

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline V load(const bf16* p) {
  H h;
  memcpy(&h, p, sizeof(h));
  return (V)(__builtin_convertvector(h, W) << 16);
}
inline V load(const f16* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  V v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof(v)); }
/// For p aligned to 64 bytes: does not read the line into the caches first.
inline void store_past_cache(float* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
/// Makes what was stored past the caches visible, as an ordinary store is.
inline void finish_stores() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
inline void store(bf16* p, V v) {  // round to nearest even
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const W u = (W)v, nan = (W)(v != v);
  const W rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const H h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
#endif
  memcpy(p, &h, sizeof(h));
}
inline void store(f16* p, V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < LANES; i++) from_float(v[i], p + i);
#endif
}

/// The first n lanes, 0 <= n <= LANES; the others are zero and their memory is not touched.
template <class T>
inline V load_first(const T* p, int n) {
  T part[LANES] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_first(T* p, V v, int n) {
  T part[LANES];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

/// v where bit i of `bits` is set, 0 (also in place of NaN) where it is not.
inline V keep(V v, u32 bits) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
  W lane;
  for (int i = 0; i < LANES; i++) lane[i] = 1u << i;
  return (V)((W)v & (W)((lane & bits) != 0));
#endif
}

/// LANES doubles.
struct Doubles {
  D low, high;
};
inline Doubles to_doubles(V v) {
#if defined(__AVX512F__)
  return {(D)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (D)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  HalfV half[2];
  memcpy(half, &v, sizeof(v));
  return {__builtin_convertvector(half[0], D), __builtin_convertvector(half[1], D)};
#endif
}
inline V to_floats(Doubles d) {
#if defined(__AVX512F__)
  return (V)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)d.low)),
                               _mm512_cvtpd_ps((__m512d)d.high), 1);
#elif defined(__AVX2__)
  return (V)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)d.high), _mm256_cvtpd_ps((__m256d)d.low));
#else
  const HalfV half[2] = {__builtin_convertvector(d.low, HalfV), __builtin_convertvector(d.high, HalfV)};
  V v;
  memcpy(&v, half, sizeof(v));
  return v;
#endif
}

inline float sum(V v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

/// Calls f with a pointer type that stands for `dtype`: dispatch(dtype, [&](auto* type) {...}).
template <class F>
inline void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    case DType::f16:
      return f((f16*)nullptr);
  }
}

}  // namespace
}  // namespace llmbuilder::LLMBUILDER_ISA
