// y = scaling S B^T + bias, write only; or y += scaling S B^T, for a base that someone else has computed.
//
//                 ranks             columns: 4 mma make 32          a block, of 4 x 2 warps
//               +-------+           +----+----+----+----+           +-----------+-----------+
//   S  32 rows  |       |   times   | B^T                | ->       | 32 x 128 B|           |
//               +-------+           +----+----+----+----+           +-----------+-----------+
//
// Within each 32 columns of y, those of the four mma are permuted:
//
//     mma j's column               0, 1      2, 3       4, 5        6, 7
//     is column of y        2j +   0, 1      8, 9       16, 17      24, 25
//
// so that D gives lane t columns 8t ... 8t + 7, two from each mma: an Eight, stored by 16 bytes from registers, with no
// shared memory and no barrier. The permutation costs nothing: it only says which row of B a lane loads.
//
// Traffic, in bytes, with e of an element, and quotients rounded up:
//     e M N                    y, written; when accumulating also read
//     N / (128 / e) * e M r    S, asked for by every warp of columns, and
//     M / 32 * e N r           B, asked for by every warp of rows, nearly always from a cache
//     M / 32 * e N             the bias, likewise
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/tiles.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

template <class T>
struct Expand {
  T* y;
  int64_t y_stride;
  bool y_vector;  // and the bias
  const T* bias;  // or null
  View<T> S, B;
  float scaling;
  bool accumulate;
  int64_t column_blocks;
};

/// ALIGNED: all matrices are; else each says so for itself.
template <class Math, class Tile, bool ALIGNED>
__global__ void __launch_bounds__(Tile::THREADS, Math::FMA ? 1 : Tile::BLOCKS)
    expand_kernel(Expand<typename Math::Element> a) {
  using T = typename Math::Element;
  constexpr int EIGHTS = 2 * Tile::ROW_TILES, GROUPS = Tile::COLUMN_GROUPS;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int64_t row =
      blockIdx.x / a.column_blocks * Tile::ROWS + warp % Tile::ROW_WARPS * Tile::ROW_TILES * MMA_ROWS + g;
  const int64_t column = blockIdx.x % a.column_blocks * Tile::COLUMNS + warp / Tile::ROW_WARPS * GROUPS * 32;
  if (ALIGNED) a.S.vector = a.B.vector = true;

  float sums[Tile::ROW_TILES][GROUPS][4][4] = {};
  for (int64_t rank = 8 * t; rank - 8 * t < a.S.columns; rank += DEPTH) {
    Eight<T> s[EIGHTS];
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) s[i] = operand<Math>(a.S.eight(row + 8 * i, rank));
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const Eight<T> b = operand<Math>(a.B.eight(column + 32 * q + 8 * (g / 2) + 2 * j + g % 2, rank));
#pragma unroll
        for (int i = 0; i < Tile::ROW_TILES; i++) multiply<Math>(sums[i][q][j], s[2 * i], s[2 * i + 1], b);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    const int64_t m = row + 8 * i;
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
      const int64_t n = column + 32 * q + 8 * t;
      float values[8];
#pragma unroll
      for (int k = 0; k < 8; k++) values[k] = a.scaling * sums[i / 2][q][k / 2][i % 2 * 2 + k % 2];
      const int64_t valid = m < a.S.rows ? a.B.rows - n : 0;
      write_eight(a.y + m * a.y_stride + n, a.bias ? a.bias + n : nullptr, a.accumulate, valid, ALIGNED || a.y_vector,
                  values);
    }
  }
}

}  // namespace

Status lora_expand(const Launch& launch, DType dtype, ConstMatrix S, ConstMatrix B, const void* bias, float scaling,
                   bool accumulate, Matrix y, bool tf32) {
  const int64_t M = S.rows, N = B.rows, r = B.columns;
  Check check("lora_expand");
  check.matrix("S", S, M, r).matrix("B", B, N, r).matrix("y", y, M, N);
  check.that(!accumulate || !bias, "there is no bias where the update is added to y");
  if (!check.status()) return check.status();
  if (M == 0 || N == 0) return {};

  return with_math(dtype, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    using Tile = ExpandTile<sizeof(T)>;
    const int64_t column_blocks = parts_of(N, Tile::COLUMNS), blocks = parts_of(M, Tile::ROWS) * column_blocks;
    if (!check.blocks(blocks).status()) return check.status();
    const bool y_vector = aligned<T>(y) && aligned<T>({bias, 1, N, 0});
    const Expand<T> a{static_cast<T*>(y.data),
                      y.stride,
                      y_vector,
                      static_cast<const T*>(bias),
                      view<T>(S),
                      view<T>(B),
                      scaling,
                      accumulate,
                      column_blocks};
    if (y_vector && a.S.vector && a.B.vector)
      return LAUNCH((expand_kernel<Math, Tile, true>), blocks, Tile::THREADS, 0, launch, a);
    return LAUNCH((expand_kernel<Math, Tile, false>), blocks, Tile::THREADS, 0, launch, a);
  });
}

}  // namespace llmbuilder::gpu
