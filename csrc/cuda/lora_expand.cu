// y = scaling S B^T + bias, write only; or y += scaling S B^T, for a base that someone else has computed.
//
// A warp computes 32 x 64 of y, a block 128 x 128 by 4 x 2 warps. In each 32 columns of y the columns of four mma are
// permuted,
//
//     mma j's column    0 1    2 3    4 5      6 7              lane t's D of mma 0, 1, 2, 3 are columns
//     column of y     2j+0,1  +8,9   +16,17   +24,25            8t + 0,1   8t + 2,3   8t + 4,5   8t + 6,7
//
// so that a lane ends up with Eights of y: 16-byte stores from registers, with no shared memory and no barrier. The
// permutation costs nothing, as it only says which row of B a lane loads.
//
// Traffic: y written once (and read once when accumulating); S and B once a block, nearly always from caches.
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
    const dim3 grid(blocks);
    if (y_vector && a.S.vector && a.B.vector)
      return LAUNCH((expand_kernel<Math, Tile, true>), grid, Tile::THREADS, 0, launch, a);
    return LAUNCH((expand_kernel<Math, Tile, false>), grid, Tile::THREADS, 0, launch, a);
  });
}

}  // namespace llmbuilder::gpu
