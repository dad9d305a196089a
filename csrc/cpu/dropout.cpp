#include "isa.h"
#include "mask.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

constexpr int BLOCK = 256;       // columns: four draws of the mask, interleaved
constexpr i64 TASK_BLOCKS = 64;  // blocks that a thread takes at once

/// Calls visit(row, first column, columns of it) for every block of every row.
template <class Visit>
void for_each_block(i64 rows, i64 columns, int threads, Visit visit) {
  const i64 row_blocks = parts_of(columns, BLOCK), blocks = rows * row_blocks;
#pragma omp parallel for schedule(static) num_threads(team(rows* columns, threads))
  for (i64 first = 0; first < blocks; first += TASK_BLOCKS) {
    i64 row = first / row_blocks, column = first % row_blocks * BLOCK;
    for (i64 left = least(TASK_BLOCKS, blocks - first); left > 0; left--) {
      visit(row, column, (int)least<i64>(BLOCK, columns - column));
      column += BLOCK;
      if (column >= columns) column = 0, row++;
    }
    finish_stores();
  }
}

/// 64 columns, of which n are there. PAST_CACHE: y is aligned to a cache line and written past the caches.
template <bool PAST_CACHE, class T>
inline void apply(const T* x, T* y, u64 bits, float scale, int n) {
  if (n >= 64) {
#pragma GCC unroll 16
    for (int v = 0; v < 64; v += LANES) {
      const V kept = keep(load(x + v), u32(bits >> v)) * scale;
      if constexpr (PAST_CACHE) {
        store_past_cache(y + v, kept);
      } else {
        store(y + v, kept);
      }
    }
  } else {
    for (int v = 0; v < n; v += LANES) {
      const int some = least(LANES, n - v);
      store_first(y + v, keep(load_first(x + v, some), u32(bits >> v)) * scale, some);
    }
  }
}

template <bool PAST_CACHE, class T>
void run(const T* x, T* y, i64 rows, i64 columns, Mask mask, int threads) {
  const float scale = mask.scale();
  for_each_block(rows, columns, threads, [=](i64 row, i64 column, int n) {
    const T* from = x + row * columns + column;
    T* to = y + row * columns + column;
    u64 bits[BLOCK / 64];
    if (n == BLOCK) {
      // the rounds of the mask fill the processor's window: ask for the memory early
      for (int c = 0; c < BLOCK; c += 64 / (int)sizeof(T)) {
        __builtin_prefetch(from + 2048 + c, 0, 2);
        if (!PAST_CACHE) __builtin_prefetch(to + 2048 + c, 1, 2);
      }
      mask.draw<4>(row, 0, column / 64, 1, bits);
    } else {
      for (int c = 0; c < n; c += 64) mask.draw<1>(row, 0, (column + c) / 64, 1, bits + c / 64);
    }
    for (int c = 0; c < n; c += 64) apply<PAST_CACHE>(from + c, to + c, bits[c / 64], scale, n - c);
  });
}

/// A float tensor too large for the caches is not read into them only to be overwritten.
void run(const float* x, float* y, i64 rows, i64 columns, Mask mask, int threads) {
  constexpr i64 LARGE = i64(1) << 22;  // elements
  const bool aligned = (size_t)y % 64 == 0 && columns % 16 == 0;
  if (rows * columns >= LARGE && aligned) {
    run<true>(x, y, rows, columns, mask, threads);
  } else {
    run<false>(x, y, rows, columns, mask, threads);
  }
}

template <class T>
void run(const T* x, T* y, i64 rows, i64 columns, Mask mask, int threads) {
  run<false>(x, y, rows, columns, mask, threads);
}

}  // namespace

void dropout(DType dtype, const void* x, void* y, int64_t rows, int64_t columns, MaskKey key, int threads) {
  dispatch(dtype, [&](auto* type) { run((decltype(type))x, (decltype(type))y, rows, columns, Mask{key}, threads); });
}

void dropout_mask(uint8_t* out, int64_t rows, int64_t columns, MaskKey key, int threads) {
  const Mask mask{key};
  for_each_block(rows, columns, threads, [=](i64 row, i64 column, int n) {
    uint8_t* to = out + row * columns + column;
    for (int c = 0; c < n; c += 64) {
      u64 bits;
      mask.draw<1>(row, 0, (column + c) / 64, 1, &bits);
      for (int i = 0; i < least(64, n - c); i++) to[c + i] = bits >> i & 1;
    }
  });
}

void philox(const uint32_t* counters, uint32_t* words, int64_t n, uint64_t key) {
  for (i64 at = 0; at < n; at += CALLS) {
    Q c[4][1] = {};
    const int some = (int)least<i64>(CALLS, n - at);
    for (int i = 0; i < some; i++)
      for (int w = 0; w < 4; w++) c[w][0][i] = counters[4 * (at + i) + w];
    philox_rounds(c, key);
    for (int i = 0; i < some; i++)
      for (int w = 0; w < 4; w++) words[4 * (at + i) + w] = u32(c[w][0][i]);
  }
}

}  // namespace llmbuilder::LLMBUILDER_ISA
