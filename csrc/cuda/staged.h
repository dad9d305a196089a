// Tiles of matrices in shared memory, and a warp's product of two of them.
//
// A tile is kept as it lies in memory, rows of COLUMNS elements, each followed by 16 bytes of padding: eight rows'
// 16-byte pieces then lie in eight different groups of banks, and ldmatrix reads them in one go, transposed or not.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

namespace llmbuilder::gpu {

/// Where a product begins to read a tile; PITCH elements on lies the next row.
template <class T, int PITCH>
struct Corner {
  const T* at;

  DEVICE const T& operator()(int row, int column) const { return at[row * PITCH + column]; }
};

template <class T, int ROWS_, int COLUMNS_>
struct Staged {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, PITCH = COLUMNS + 16 / int(sizeof(T));
  static constexpr int SIZE = ROWS * PITCH, BYTES = SIZE * int(sizeof(T)), EIGHTS = ROWS * COLUMNS / 8;
  T* at;

  DEVICE T* end() const { return at + SIZE; }
  DEVICE T* place(int row, int column) const { return at + row * PITCH + column; }
  DEVICE Corner<T, PITCH> from(int row, int column) const { return {place(row, column)}; }

  /// The tile becomes matrix[row ..., column ...], zero outside the matrix. Copies of 16 bytes go on in the background:
  /// the tile is complete after cp_async_commit, cp_async_wait and a barrier.
  DEVICE void fill(const View<T>& matrix, int64_t row, int64_t column) const {
    for (int i = threadIdx.x; i < EIGHTS; i += blockDim.x) {
      const int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
      const int64_t valid = row + r < matrix.rows ? matrix.columns - (column + c) : 0;
      const T* source = matrix.at + (row + r) * matrix.stride + column + c;
      if (matrix.vector) {
#pragma unroll
        for (int e = 0; e < 8; e += 16 / int(sizeof(T))) cp_async16(place(r, c + e), source + e, valid > 0);
      } else {
        Eight<T>::load(source, valid, false).store(place(r, c), 8, true);
      }
    }
  }
};

/// The operand A of 16 rows and one step of depth, by fragments as mma.h lays them out. TRANSPOSED: the tile's rows are
/// the depth.
template <bool TRANSPOSED, class T, int PITCH>
DEVICE void load_a(uint32_t (&a)[4], Corner<T, PITCH> tile, int row, int depth) {
  const int lane = threadIdx.x % WARP;
  if constexpr (sizeof(T) == 2) {
    const int i = lane % 8, right = lane / 8 % 2 * 8, below = lane / 16 * 8;
    if constexpr (TRANSPOSED) {
      ldmatrix_x4_trans(a, &tile(depth + below + i, row + right));
    } else {
      ldmatrix_x4(a, &tile(row + right + i, depth + below));
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int m = row + g + q % 2 * 8, k = depth + t + q / 2 * 4;
      a[q] = bits_of(TRANSPOSED ? tile(k, m) : tile(m, k));
    }
  }
}

/// The operand B of one step of depth, the tile's rows, and 16 columns: two fragments. Where only the first is wanted
/// the second may come from the padding.
template <class T, int PITCH>
DEVICE void load_b(uint32_t (&b)[4], Corner<T, PITCH> tile, int depth, int column) {
  const int lane = threadIdx.x % WARP;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(b, &tile(depth + lane % 16, column + lane / 16 * 8));
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) b[q] = bits_of(tile(depth + t + q % 2 * 4, column + g + q / 2 * 8));
  }
}

/// Two floats side by side, at a multiple of 8 bytes.
struct alignas(8) Pair {
  float left, right;
};

/// sums[16 M, 8 N] += A[16 M, TERMS] B[TERMS, 8 N]; TRANSPOSED: a holds A's transpose.
template <class Math, bool TRANSPOSED, int TERMS, int M, int N, class T, int PITCH_A, int PITCH_B>
DEVICE void multiply_tiles(float (&sums)[M][N][4], Corner<T, PITCH_A> a, Corner<T, PITCH_B> b) {
  if constexpr (std::is_same_v<Math, MathFP32>) {  // shared memory hands out what mma.h's FMA must shuffle for
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll 4
    for (int k = 0; k < TERMS; k++) {
      Pair columns[N];
#pragma unroll
      for (int n = 0; n < N; n++) columns[n] = load(reinterpret_cast<const Pair*>(&b(k, 8 * n + 2 * t)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        const float upper = TRANSPOSED ? a(k, 16 * m + g) : a(16 * m + g, k);
        const float lower = TRANSPOSED ? a(k, 16 * m + 8 + g) : a(16 * m + 8 + g, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
          sums[m][n][0] = fmaf(upper, columns[n].left, sums[m][n][0]);
          sums[m][n][1] = fmaf(upper, columns[n].right, sums[m][n][1]);
          sums[m][n][2] = fmaf(lower, columns[n].left, sums[m][n][2]);
          sums[m][n][3] = fmaf(lower, columns[n].right, sums[m][n][3]);
        }
      }
    }
  } else {
    constexpr int STEP = 32 / int(sizeof(T));
#pragma unroll 4
    for (int k = 0; k < TERMS; k += STEP) {
      uint32_t fa[M][4], fb[(N + 1) / 2][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        load_a<TRANSPOSED>(fa[m], a, 16 * m, k);
#pragma unroll
        for (uint32_t& word : fa[m]) word = Math::operand(word);
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        load_b(fb[n / 2], b, k, 8 * n);
#pragma unroll
        for (uint32_t& word : fb[n / 2]) word = Math::operand(word);
      }
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
          const uint32_t column[2] = {fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]};
          Math::mma(sums[m][n], fa[m], column);
        }
      }
    }
  }
}

/// f(row, column, value, value of column + 1) for what this lane holds of a product.
template <int M, int N, class F>
DEVICE void each_pair(const float (&sums)[M][N][4], F f) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int h = 0; h < 2; h++) f(16 * m + 8 * h + g, 8 * n + 2 * t, sums[m][n][2 * h], sums[m][n][2 * h + 1]);
    }
  }
}

/// tile[row + ..., column + ...] = scale * the product.
template <class T, int ROWS, int COLUMNS, int M, int N>
DEVICE void put(const Staged<T, ROWS, COLUMNS>& tile, int row, int column, const float (&sums)[M][N][4], float scale) {
  each_pair(sums, [&](int r, int c, float left, float right) {
    T* to = tile.place(row + r, column + c);
    if constexpr (sizeof(T) == 2) {
      store(reinterpret_cast<uint32_t*>(to), pack<T>(scale * left, scale * right));
    } else {
      store(reinterpret_cast<Pair*>(to), Pair{scale * left, scale * right});
    }
  });
}

/// to[row * stride + column] = what the block has summed, inside of [rows, columns] whose corner is the product's. Four
/// lanes write eight floats side by side: a sector, where rows are aligned.
template <int M, int N>
DEVICE void store_sums(const float (&sums)[M][N][4], float* to, int64_t rows, int64_t columns, int64_t stride) {
  each_pair(sums, [&](int row, int column, float left, float right) {
    if (row >= rows) return;
    if (column < columns) store(to + row * stride + column, left);
    if (column + 1 < columns) store(to + row * stride + column + 1, right);
  });
}

}  // namespace llmbuilder::gpu
