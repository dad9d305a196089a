// The mask of philox.h, 64 columns at a time, as bits.
#pragma once
#include "llmbuilder/philox.h"
#include "vec.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr int CALLS = LANES / 2;          // Philox calls in a vector, one in each 64-bit lane
constexpr int GROUPS = 64 / (8 * CALLS);  // vectors for 64 columns

/// The low halves' product, 32 x 32 -> 64 bits; upper halves are ignored.
inline Q multiply(Q a, u32 b) {
#if defined(__AVX512F__)
  return (Q)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Q)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * (u64)b;
#endif
}

/// U counters go through the rounds together, which hides the latency of the multiplications. Words are the low halves
/// of the lanes; upper halves are garbage throughout.
template <int U>
inline void philox_rounds(Q (&c)[4][U], u64 key) {
  u32 k0 = u32(key), k1 = u32(key >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += PHILOX_WEYL_0, k1 += PHILOX_WEYL_1)
    for (int u = 0; u < U; u++) {
      const Q p0 = multiply(c[0][u], PHILOX_MULTIPLIER_0), p1 = multiply(c[2][u], PHILOX_MULTIPLIER_1);
      c[0][u] = (p1 >> 32) ^ c[1][u] ^ (u64)k0;
      c[1][u] = p1;
      c[2][u] = (p0 >> 32) ^ c[3][u] ^ (u64)k1;
      c[3][u] = p0;
    }
}

struct Mask {
  MaskKey key;

  float scale() const { return float(65536.0 / (65536.0 - key.threshold)); }

  /// bits[u] = the keep bits of columns 64*block .. 64*block + 63 of a row; from one u to the next, row grows by
  /// `row_step` and block by `block_step`.
  template <int U>
  inline void draw(i64 row, int row_step, i64 block, int block_step, u64* bits) const {
    constexpr int N = GROUPS == 1 ? U : 1;  // as many as there are registers for
    for (int u = 0; u < U; u += N)
      draw_together<N>(row + u * row_step, row_step, block + u * block_step, block_step, bits + u);
  }

 private:
  template <int U>
  inline void draw_together(i64 row, int row_step, i64 block, int block_step, u64* bits) const {
    Q c[4][U * GROUPS], lane;
    for (int i = 0; i < CALLS; i++) lane[i] = i;
    for (int u = 0; u < U; u++)
      for (int g = 0; g < GROUPS; g++) {
        const int v = u * GROUPS + g;
        c[0][v] = lane + u64(8 * (block + u * block_step) + g * CALLS);
        c[1][v] = Q{} + u64(row + u * row_step);
        c[2][v] = Q{} + u64(key.stream);
        c[3][v] = Q{};
      }
    philox_rounds(c, key.seed);
    for (int u = 0; u < U; u++) {
      bits[u] = 0;
      for (int g = 0; g < GROUPS; g++) {
        const int v = u * GROUPS + g;
        const Q front = (c[0][v] & 0xffffffffu) | (c[1][v] << 32), back = (c[2][v] & 0xffffffffu) | (c[3][v] << 32);
        bits[u] |= compare(front, back) << (8 * CALLS * g);
      }
    }
  }

  /// Eight bits a call: four slices in its lane of `front`, then four in its lane of `back`.
  inline u64 compare(Q front, Q back) const {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i t = _mm512_set1_epi16((short)key.threshold);
    const u64 first = _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64((__m512i)front, low, (__m512i)back), t);
    const u64 second = _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64((__m512i)front, high, (__m512i)back), t);
    return first | second << 32;
#elif defined(__AVX2__)
    const __m256i t = _mm256_set1_epi16((short)key.threshold);
    const auto kept = [t](__m256i s) { return _mm256_cmpeq_epi16(_mm256_max_epu16(s, t), s); };
    // packs works within 128 bits, as the two unpacks did, and so puts the calls back in order
    const __m256i even = kept(_mm256_unpacklo_epi64((__m256i)front, (__m256i)back));
    const __m256i odd = kept(_mm256_unpackhi_epi64((__m256i)front, (__m256i)back));
    return (u32)_mm256_movemask_epi8(_mm256_packs_epi16(even, odd));
#else
    u64 bits = 0;
    for (int i = 0; i < CALLS; i++)
      for (int s = 0; s < 4; s++) {
        bits |= u64(u16(front[i] >> (16 * s)) >= key.threshold) << (8 * i + s);
        bits |= u64(u16(back[i] >> (16 * s)) >= key.threshold) << (8 * i + 4 + s);
      }
    return bits;
#endif
  }
};

}  // namespace
}  // namespace llmbuilder::LLMBUILDER_ISA
