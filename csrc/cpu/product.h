// What the LoRA kernels are made of: tiles of a large matrix, packed skinny operands, and one inner loop.
//
// A product takes its operands as words. A word is one float or, where the processor has a bf16 dot product, a pair of
// bf16 that are neighbours along the summed axis; DEPTH is the number of elements in a word. Operands are padded with
// zeros, so that inner loops have no tails: r to RANK_STEP, tiles to ROWS x COLS.
#pragma once
#include "mask.h"
#include "vec.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr int ROWS = 32, COLS = 128, RANK_STEP = 16;
constexpr i64 RUN = 32;
// accumulators of the inner loop, vertically in rows and horizontally in vectors: as many as there are registers for
#if defined(__AVX512F__)
constexpr int PRODUCT_ROWS = 16, PRODUCT_VECTORS = 1, UPDATE_ROWS = 8, UPDATE_VECTORS = 2;
#else
constexpr int PRODUCT_ROWS = 4, PRODUCT_VECTORS = 2, UPDATE_ROWS = 4, UPDATE_VECTORS = 2;
#endif
constexpr int PANEL = UPDATE_VECTORS * LANES;

template <class T>
struct Operand {
  using Word = float;
  static constexpr int DEPTH = 1;
  static Word word(const T* element, i64, bool) { return to_float(*element); }
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using Word = u32;
  static constexpr int DEPTH = 2;
  static Word word(const bf16* element, i64 next, bool has_next) {
    return element[0].bits | (has_next ? u32(element[next].bits) << 16 : 0);
  }
};
inline V multiply_add(V sum, u32 word, V words) {
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_epi32((int)word));
}
inline V load(const u32* p) { return load((const float*)p); }
#endif
template <class T>
using Word = typename Operand<T>::Word;
template <class T>
constexpr int DEPTH = Operand<T>::DEPTH;

inline V multiply_add(V sum, float word, V words) { return sum + word * words; }

/// sum[i][v] += over steps t: left[i * row + t * step] * right[t * width + v * LANES ...]
template <int R, int C, class Word>
inline void accumulate(V (&sum)[R][C], const Word* left, i64 row, i64 step, i64 steps, const Word* right, i64 width) {
  for (i64 t = 0; t < steps; t++) {
    V b[C];
#pragma GCC unroll 2
    for (int v = 0; v < C; v++) b[v] = load(right + t * width + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
      for (int v = 0; v < C; v++) sum[i][v] = multiply_add(sum[i][v], left[i * row + t * step], b[v]);
  }
}

/// out[rows][r] += left[rows][steps] * right[steps][r], all padded; left's element (i, t) at i * row + t * step.
/// Sums start afresh every RUN steps, which keeps rounding errors from growing with the length of the sum.
template <class Word>
inline void product(const Word* left, i64 row, i64 step, int rows, i64 steps, const Word* right, i64 r, float* out) {
  constexpr int R = PRODUCT_ROWS, C = PRODUCT_VECTORS;
  for (int m = 0; m < rows; m += R)
    for (i64 j = 0; j < r; j += C * LANES)
      for (i64 t = 0; t < steps; t += RUN) {
        V sum[R][C] = {};
        accumulate(sum, left + m * row + t * step, row, step, least(RUN, steps - t), right + t * r + j, r);
        float* to = out + m * r + j;
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
          for (int v = 0; v < C; v++) store(to + i * r + v * LANES, load(to + i * r + v * LANES) + sum[i][v]);
      }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

/// Keep bits of a tile.
struct Bits {
  u64 at[ROWS][COLS / 64];

  /// No mask: keeps everything.
  void set() { memset(at, 0xff, sizeof(at)); }
  void draw(const Mask& mask, i64 m0, int rows, i64 c0, int cols) {
    for (int c = 0; c < cols; c += 64)
      for (int m = 0; m < rows; m += 4) {
        u64 bits[4];
        mask.draw<4>(m0 + m, 1, (c0 + c) / 64, 0, bits);
        for (int i = 0; i < 4; i++) at[m + i][c / 64] = bits[i];
      }
  }
  u32 from(int m, int c) const { return u32(at[m][c / 64] >> (c % 64)); }
};

/// LANES elements of a row, of which `left` are there; zeros beyond.
template <class T>
inline V load_up_to(const T* p, int left) {
  return left >= LANES ? load(p) : left > 0 ? load_first(p, left) : V{};
}

/// A tile as the left operand of a product that sums over its columns, and of one that sums over its rows. Where a word
/// is one element both are the same.
template <class T, int depth = DEPTH<T>>
struct Tile {
  alignas(64) float at[ROWS][COLS];

  const float* over_columns() const { return at[0]; }
  const float* over_rows() const { return at[0]; }

  template <bool OVER_COLUMNS, bool OVER_ROWS>
  void fill(const T* x, i64 stride, int rows, int cols, const Bits& bits) {
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
      for (int c = 0; c < COLS; c += LANES)
        store(&at[m][c], m < rows ? keep(load_up_to(x + m * stride + c, cols - c), bits.from(m, c)) : V{});
  }
};

#if defined(__AVX512BF16__)
template <>
struct Tile<bf16, 2> {
  alignas(64) u32 columns[ROWS][COLS / 2];  // (x[m][2c], x[m][2c+1])
  alignas(64) u32 rows[ROWS / 2][COLS];     // (x[2m][c], x[2m+1][c])

  const u32* over_columns() const { return columns[0]; }
  const u32* over_rows() const { return rows[0]; }

  template <bool OVER_COLUMNS, bool OVER_ROWS>
  void fill(const bf16* x, i64 stride, int row_count, int cols, const Bits& bits) {
    for (int m = 0; m < ROWS; m += 2)
#pragma GCC unroll 4
      for (int c = 0; c < COLS; c += 32) {
        const __m512i even = masked(x + m * stride + c, m < row_count ? cols - c : 0, bits.from(m, c));
        const __m512i odd = masked(x + (m + 1) * stride + c, m + 1 < row_count ? cols - c : 0, bits.from(m + 1, c));
        if (OVER_COLUMNS) {
          _mm512_store_si512(&columns[m][c / 2], even);
          _mm512_store_si512(&columns[m + 1][c / 2], odd);
        }
        if (OVER_ROWS) {
          _mm512_store_si512(&rows[m / 2][c], pairs(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
          _mm512_store_si512(&rows[m / 2][c + 16],
                             pairs(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
        }
      }
  }

 private:
  /// 32 elements, of which `left` are there, zeros where the mask drops.
  static __m512i masked(const bf16* p, int left, u32 bits) {
    const u32 there = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_maskz_loadu_epi16(bits & there, p);
  }
  static __m512i pairs(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
};
#endif

/// out[rows][r] += tile[rows][COLS] * right[COLS][r].
template <class T>
inline void sum_over_columns(const Tile<T>& tile, int rows, const Word<T>* right, i64 r, float* out) {
  product(tile.over_columns(), COLS / DEPTH<T>, 1, rows, COLS / DEPTH<T>, right, r, out);
}
/// out[cols][r] += tile[ROWS][cols]^T * right[ROWS][r].
template <class T>
inline void sum_over_rows(const Tile<T>& tile, int cols, const Word<T>* right, i64 r, float* out) {
  product(tile.over_rows(), 1, COLS, cols, ROWS / DEPTH<T>, right, r, out);
}

/// Asks for a tile that is needed soon: tiles jump from row to row too often for the processor to guess.
template <class T>
inline void prefetch(const T* x, i64 M, i64 stride, i64 m0, i64 c0) {
  const int rows = (int)least<i64>(ROWS, M - m0), cols = (int)least<i64>(COLS, stride - c0);
  for (int m = 0; m < rows; m++)
    for (int c = 0; c < cols; c += 64 / (int)sizeof(T)) __builtin_prefetch(x + (m0 + m) * stride + c0 + c, 0, 2);
}

/// y[rows][cols] += scale * keep * (s[rows][r] * b[r][cols]); s unpadded in rows past a multiple of UPDATE_ROWS, b in
/// panels of PANEL columns.
template <class T>
inline void update(T* y, i64 stride, int rows, int cols, const Word<T>* s, const Word<T>* b, i64 r, float scale,
                   const Bits& bits) {
  constexpr int R = UPDATE_ROWS, C = UPDATE_VECTORS;
  const i64 steps = r / DEPTH<T>;
  for (int m = 0; m < rows; m += R)
    for (int c = 0; c < cols; c += PANEL) {
      V sum[R][C] = {};
      accumulate(sum, s + m * steps, steps, 1, steps, b + c * steps, PANEL);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        if (m + i >= rows) break;
        const u32 kept = bits.from(m + i, c);
#pragma GCC unroll 2
        for (int v = 0; v < C; v++) {
          T* to = y + (m + i) * stride + c + v * LANES;
          const V add = keep(sum[i][v], kept >> (v * LANES)) * scale;
          const int left = cols - c - v * LANES;
          if (left >= LANES) {
            store(to, load(to) + add);
          } else if (left > 0) {
            store_first(to, load_first(to, left) + add, left);
          }
        }
      }
    }
}

// ---- packed operands ------------------------------------------------------------------------------------------------

struct Axis {
  i64 size, stride;
};

/// Words of a skinny matrix in panels: out[panel][step][width], element (d, w) of the matrix at from[d * depth.stride +
/// w * width.stride]. Fills lines [first, last) of `width` words each; a line is one step of one panel.
template <class T>
inline void pack_lines(const T* from, Axis depth, Axis width, i64 panel, i64 steps, i64 first, i64 last, Word<T>* out) {
  i64 step = first % steps, w0 = first / steps * panel;
  for (i64 line = first; line < last; line++) {
    const i64 d = step * DEPTH<T>;
    const i64 there = d < depth.size ? most<i64>(0, least(panel, width.size - w0)) : 0;
    Word<T>* to = out + line * panel;
    const T* element = from + d * depth.stride + w0 * width.stride;
    for (i64 w = 0; w < there; w++)
      to[w] = Operand<T>::word(element + w * width.stride, depth.stride, d + 1 < depth.size);
    for (i64 w = there; w < panel; w++) to[w] = 0;
    if (++step == steps) step = 0, w0 += panel;
  }
}

template <class T>
inline void pack(const T* from, Axis depth, Axis width, i64 panel, i64 steps, i64 panels, Word<T>* out, int threads) {
  const i64 lines = steps * panels, task = 64;
#pragma omp parallel for schedule(static) num_threads(team(lines* panel, threads))
  for (i64 first = 0; first < lines; first += task)
    pack_lines(from, depth, width, panel, steps, first, least(lines, first + task), out);
}

}  // namespace
}  // namespace llmbuilder::LLMBUILDER_ISA
