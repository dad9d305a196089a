#include "isa.h"
#include "product.h"
#include "workspace.h"

namespace llmbuilder::LLMBUILDER_ISA {
namespace {

/// Rows are cut into parts that have partial sums of their own, which are added in order at the end: by shape alone, so
/// that no sum depends on the number of threads. `bytes` is the size of one part's sums.
struct Parts {
  i64 rows, count;

  static Parts cut(i64 M, i64 bytes) {
    constexpr i64 FEWEST = 4, MOST = 16, SPACE = i64(32) << 20;
    const i64 count = most(FEWEST, least(MOST, SPACE / most<i64>(bytes, 1)));
    const i64 rows = most<i64>(2 * ROWS, round_up(parts_of(M, count), ROWS));
    return {rows, most<i64>(1, parts_of(M, rows))};  // no rows: one empty part, whose sums are zero
  }
};

/// x after dropout and the products' factor that goes with it; no mask when nothing is dropped.
struct Drop {
  Mask mask;

  bool none() const { return mask.key.threshold == 0; }
  float scale() const { return mask.scale(); }
  void draw(Bits& bits, i64 m0, int rows, i64 c0, int cols) const {
    if (!none()) bits.draw(mask, m0, rows, c0, cols);
  }
};

template <class T>
void store_scaled(T* to, const float* sums, i64 rows, i64 r, i64 padded, float scale) {
  for (i64 m = 0; m < rows; m++)
    for (i64 j = 0; j < r; j++) from_float(scale * sums[m * padded + j], to + m * r + j);
}

template <class T>
void shrink(const T* x, const T* A, T* S, i64 M, i64 K, i64 r, Drop drop, int threads) {
  const i64 R = round_up(r, RANK_STEP), steps = round_up(K, COLS) / DEPTH<T>;
  const Workspace packed(steps * R * sizeof(Word<T>)), sums(round_up(M, ROWS) * R * sizeof(float));
  const auto w = (Word<T>*)packed.data();
  pack(A, {K, 1}, {r, K}, R, steps, 1, w, threads);
#pragma omp parallel for schedule(dynamic) num_threads(team(M* K, threads))
  for (i64 m0 = 0; m0 < M; m0 += ROWS) {
    const int rows = (int)least<i64>(ROWS, M - m0);
    float* sum = (float*)sums.data() + m0 * R;
    memset(sum, 0, ROWS * R * sizeof(float));
    Tile<T> tile;
    Bits bits;
    bits.set();
    for (i64 c0 = 0; c0 < K; c0 += COLS) {
      const int cols = (int)least<i64>(COLS, K - c0);
      if (c0 + COLS < K) {
        prefetch(x, M, K, m0, c0 + COLS);
      } else if (m0 + ROWS < M) {
        prefetch(x, M, K, m0 + ROWS, 0);
      }
      drop.draw(bits, m0, rows, c0, cols);
      tile.template fill<true, false>(x + m0 * K + c0, K, rows, cols, bits);
      sum_over_columns(tile, rows, w + c0 / DEPTH<T> * R, R, sum);
    }
    store_scaled(S + m0 * r, sum, rows, r, R, drop.scale());
  }
}

template <class T>
void expand(T* y, const T* S, const T* B, i64 M, i64 N, i64 r, float scaling, int threads) {
  constexpr i64 STRIPE = 16 * COLS;  // columns of a task: also a single block of rows is shared out
  const i64 R = round_up(r, RANK_STEP), steps = R / DEPTH<T>;
  const i64 row_blocks = parts_of(M, ROWS), stripes = parts_of(N, STRIPE);
  const Workspace packed(round_up(N, PANEL) * R * sizeof(Word<T>)), skinny(row_blocks * ROWS * R * sizeof(Word<T>));
  const auto b = (Word<T>*)packed.data(), s = (Word<T>*)skinny.data();
  pack(B, {r, 1}, {N, r}, PANEL, steps, parts_of(N, PANEL), b, threads);
  pack(S, {r, 1}, {M, r}, 1, steps, row_blocks * ROWS, s, threads);
#pragma omp parallel for schedule(static) num_threads(team(M* N, threads))
  for (i64 task = 0; task < row_blocks * stripes; task++) {
    const i64 m0 = task / stripes * ROWS, first = task % stripes * STRIPE, last = least(N, first + STRIPE);
    const int rows = (int)least<i64>(ROWS, M - m0);
    Bits bits;
    bits.set();
    for (i64 c0 = first; c0 < last; c0 += COLS) {
      if (c0 + COLS < last) prefetch(y, M, N, m0, c0 + COLS);
      update(y + m0 * N + c0, N, rows, (int)least<i64>(COLS, N - c0), s + m0 * steps, b + c0 * steps, R, scaling, bits);
    }
  }
}

/// The part's partial sums over its rows, for columns c0 ... of a matrix with `columns` columns.
struct Partial {
  float* all;
  i64 columns, R;

  static i64 bytes(i64 columns, i64 R) { return round_up(columns, COLS) * R * sizeof(float); }
  float* zeroed(i64 part, i64 c0) const {
    float* at = all + (part * round_up(columns, COLS) + c0) * R;
    memset(at, 0, COLS * R * sizeof(float));
    return at;
  }
  /// out[c * column_stride + j * rank_stride] = scale * the sum of all parts, in their order.
  void reduce(i64 parts, i64 r, float scale, float* out, i64 column_stride, i64 rank_stride, int threads) const {
    const i64 size = round_up(columns, COLS) * R;
#pragma omp parallel for schedule(static) num_threads(team(columns * R * parts, threads))
    for (i64 c0 = 0; c0 < columns; c0 += LANES) {
      const i64 last = least<i64>(columns, c0 + LANES);
      for (i64 at = c0 * R; at < last * R; at += LANES) {
        V sum{};
        for (i64 part = 0; part < parts; part++) sum += load(all + part * size + at);
        store(all + at, sum * scale);
      }
      for (i64 j = 0; j < r; j++)
        for (i64 c = c0; c < last; c++) out[c * column_stride + j * rank_stride] = all[c * R + j];
    }
  }
};

template <class T>
void grad_sb(const T* dY, const T* S, const T* B, T* dS, float* dB, i64 M, i64 N, i64 r, float scaling, int threads) {
  const i64 R = round_up(r, RANK_STEP), steps = round_up(N, COLS) / DEPTH<T>;
  const Parts parts = Parts::cut(M, Partial::bytes(N, R));
  const i64 padded = parts.rows * parts.count;
  const Workspace packed(steps * R * sizeof(Word<T>)), skinny(padded / DEPTH<T> * R * sizeof(Word<T>)),
      sums(padded * R * sizeof(float)), partial(parts.count * Partial::bytes(N, R));
  const auto w = (Word<T>*)packed.data(), s = (Word<T>*)skinny.data();
  const Partial g{(float*)partial.data(), N, R};
  pack(B, {N, r}, {r, 1}, R, steps, 1, w, threads);
  pack(S, {M, r}, {r, 1}, R, padded / DEPTH<T>, 1, s, threads);
#pragma omp parallel for schedule(dynamic) num_threads(team(M* N, threads))
  for (i64 part = 0; part < parts.count; part++) {
    const i64 first = part * parts.rows, last = least(M, first + parts.rows);
    float* ds = (float*)sums.data() + first * R;
    memset(ds, 0, parts.rows * R * sizeof(float));
    Tile<T> tile;
    Bits bits;
    bits.set();
    for (i64 c0 = 0; c0 < N; c0 += COLS) {
      const int cols = (int)least<i64>(COLS, N - c0);
      float* db = g.zeroed(part, c0);
      for (i64 m0 = first; m0 < last; m0 += ROWS) {
        const int rows = (int)least<i64>(ROWS, last - m0);
        if (m0 + ROWS < last) {
          prefetch(dY, M, N, m0 + ROWS, c0);
        } else if (c0 + COLS < N) {
          prefetch(dY, M, N, first, c0 + COLS);
        }
        tile.template fill<true, true>(dY + m0 * N + c0, N, rows, cols, bits);
        sum_over_columns(tile, rows, w + c0 / DEPTH<T> * R, R, ds + (m0 - first) * R);
        sum_over_rows(tile, cols, s + m0 / DEPTH<T> * R, R, db);
      }
    }
    store_scaled(dS + first * r, ds, last - first, r, R, scaling);
  }
  g.reduce(parts.count, r, scaling, dB, r, 1, threads);
}

template <class T>
void grad_ax(const T* x, const T* dS, const T* A, float* dA, T* dX, i64 M, i64 K, i64 r, Drop drop, int threads) {
  const i64 R = round_up(r, RANK_STEP), steps = R / DEPTH<T>;
  const Parts parts = Parts::cut(M, Partial::bytes(K, R));
  const i64 padded = parts.rows * parts.count;
  const Workspace packed(round_up(K, PANEL) * R * sizeof(Word<T>)), skinny(padded * R * sizeof(Word<T>)),
      skinny_pairs(padded / DEPTH<T> * R * sizeof(Word<T>)), partial(parts.count * Partial::bytes(K, R));
  const auto a = (Word<T>*)packed.data(), over_rank = (Word<T>*)skinny.data(),
             over_rows = (Word<T>*)skinny_pairs.data();
  const Partial g{(float*)partial.data(), K, R};
  pack(dS, {M, r}, {r, 1}, R, padded / DEPTH<T>, 1, over_rows, threads);
  if (dX) {
    pack(A, {r, K}, {K, 1}, PANEL, steps, parts_of(K, PANEL), a, threads);
    pack(dS, {r, 1}, {M, r}, 1, steps, padded, over_rank, threads);
  }
#pragma omp parallel for schedule(dynamic) num_threads(team(M* K, threads))
  for (i64 part = 0; part < parts.count; part++) {
    const i64 first = part * parts.rows, last = least(M, first + parts.rows);
    Tile<T> tile;
    Bits bits;
    bits.set();
    for (i64 c0 = 0; c0 < K; c0 += COLS) {
      const int cols = (int)least<i64>(COLS, K - c0);
      float* da = g.zeroed(part, c0);
      for (i64 m0 = first; m0 < last; m0 += ROWS) {
        const int rows = (int)least<i64>(ROWS, last - m0);
        const bool below = m0 + ROWS < last, beside = c0 + COLS < K;
        if (below || beside) {
          const i64 next_row = below ? m0 + ROWS : first, next_column = below ? c0 : c0 + COLS;
          prefetch(x, M, K, next_row, next_column);
          if (dX) prefetch((const T*)dX, M, K, next_row, next_column);
        }
        drop.draw(bits, m0, rows, c0, cols);
        tile.template fill<false, true>(x + m0 * K + c0, K, rows, cols, bits);
        sum_over_rows(tile, cols, over_rows + m0 / DEPTH<T> * R, R, da);
        if (dX) update(dX + m0 * K + c0, K, rows, cols, over_rank + m0 * steps, a + c0 * steps, R, drop.scale(), bits);
      }
    }
  }
  g.reduce(parts.count, r, drop.scale(), dA, 1, K, threads);
}

}  // namespace

void lora_shrink(DType dtype, const void* x, const void* A, void* S, int64_t M, int64_t K, int64_t r, MaskKey key,
                 int threads) {
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
    shrink((const T)x, (const T)A, (T)S, M, K, r, Drop{{key}}, threads);
  });
}

void lora_expand(DType dtype, void* y, const void* S, const void* B, int64_t M, int64_t N, int64_t r, float scaling,
                 int threads) {
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
    expand((T)y, (const T)S, (const T)B, M, N, r, scaling, threads);
  });
}

void lora_grad_sb(DType dtype, const void* dY, const void* S, const void* B, void* dS, float* dB, int64_t M, int64_t N,
                  int64_t r, float scaling, int threads) {
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
    grad_sb((const T)dY, (const T)S, (const T)B, (T)dS, dB, M, N, r, scaling, threads);
  });
}

void lora_grad_ax(DType dtype, const void* x, const void* dS, const void* A, float* dA, void* dX, int64_t M, int64_t K,
                  int64_t r, MaskKey key, int threads) {
  dispatch(dtype, [&](auto* type) {
    using T = decltype(type);
    grad_ax((const T)x, (const T)dS, (const T)A, dA, (T)dX, M, K, r, Drop{{key}}, threads);
  });
}

}  // namespace llmbuilder::LLMBUILDER_ISA
