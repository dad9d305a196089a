// S = drop(x) A^T: x read once, the mask drawn in registers, nothing but S written.
//
//                 depth in steps of 32, dealt out to the depth warps
//               +--------+--------+--------+--------+--                      +--------+
//   row warp 0  | warp 0 | warp 2 | warp 0 | warp 2 |  ...   times the same  |  sums  |  of depth warp 0, then of the
//               +--------+--------+--------+--------+--      columns of A    +--------+  next, ... in order
//   row warp 1  | warp 1 | warp 3 | warp 1 | warp 3 |  ...                   |  sums  |
//               +--------+--------+--------+--------+--                      +--------+
//                                                                              ranks
//
// A lane loads Eights of x (mma.h) from global memory straight into operands of mma, one step ahead of their use, and
// draws one Philox call for each. Nothing waits on the way: shared memory and a barrier serve only to add up the depth
// warps.
//
// A few thousand rows would leave most of a GPU idle, so the depth is cut into slices as well, one a block. Their sums
// go to the workspace in fp32, and a second launch adds them in order. The number of slices follows from the shape
// alone.
//
// Traffic, in bytes, with e of an element, and quotients rounded up:
//     e M K                         x, once for each 256 ranks (for each 32 in fp32 without tf32)
//     M / (16 ROW_TILES) * e r K    A, asked for by every warp of rows; M / ROWS times where a block's warps find each
//                                   other's in the first-level cache, and nearly always from the second-level one
//     e M r                         S
//     2 * slices * 4 M r            partial sums, written and read; none where there is one slice
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/partials.h"
#include "cuda/tiles.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

template <class T>
struct Shrink {
  View<T> x, A;
  T* S;
  int64_t S_stride;
  float* partials;  // [slices, M, r], or null when there is one slice
  int64_t slice;    // columns of one
  DeviceMask mask;
  float scale;
};

/// The sums of all depth warps, added in order; they are depth warp 0's.
template <class Tile, int TILES, int RANK_TILES>
DEVICE void add_depth_warps(float (&sums)[TILES][RANK_TILES][4], int row_warp, int depth_warp) {
  constexpr int OTHERS = Tile::DEPTH_WARPS - 1, SUMS = TILES * RANK_TILES * 4;
  if constexpr (OTHERS > 0) {
    SHARED(shared, float[OTHERS][Tile::ROW_WARPS][SUMS][WARP]);
    const int lane = threadIdx.x % WARP;
    const auto each = [&](int other, auto f) {
      float* at = &shared[other][row_warp][0][lane];
#pragma unroll
      for (int i = 0; i < SUMS; i++) f(sums[i / (RANK_TILES * 4)][i / 4 % RANK_TILES][i % 4], at + i * WARP);
    };
    if (depth_warp > 0) each(depth_warp - 1, [](float sum, float* at) { store(at, sum); });
    __syncthreads();
    if (depth_warp > 0) return;
    for (int other = 0; other < OTHERS; other++) each(other, [](float& sum, const float* at) { sum += load(at); });
  }
}

/// ALIGNED: x and A are; else each says so for itself.
template <class Math, class Tile, bool ALIGNED>
__global__ void __launch_bounds__(Tile::THREADS, Tile::template blocks<typename Math::Element>())
    shrink_kernel(Shrink<typename Math::Element> a) {
  using T = typename Math::Element;
  constexpr int EIGHTS = 2 * Tile::ROW_TILES, RANK_TILES = Tile::RANK / MMA_COLUMNS;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const int row_warp = warp % Tile::ROW_WARPS, depth_warp = warp / Tile::ROW_WARPS;
  const int64_t row = int64_t(blockIdx.x) * Tile::ROWS + row_warp * Tile::ROW_TILES * MMA_ROWS + g;
  const int64_t rank = int64_t(blockIdx.z) * Tile::RANK;
  const int ranks = int(a.A.rows - rank < Tile::RANK ? a.A.rows - rank : Tile::RANK);
  if (ALIGNED) a.x.vector = a.A.vector = true;

  const Mask mask(a.mask);
  const int64_t begin = blockIdx.y * a.slice, end = begin + a.slice < a.x.columns ? begin + a.slice : a.x.columns;
  Eight<T> next[EIGHTS] = {};
  const auto fetch = [&](int64_t column) {
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) next[i] = a.x.eight(row + 8 * i, column + 8 * t);
  };
  float sums[Tile::ROW_TILES][RANK_TILES][4] = {};
  int64_t column = begin + depth_warp * DEPTH;
  if (column < end) fetch(column);
  for (; column < end; column += Tile::DEPTH_WARPS * DEPTH) {
    Eight<T> x[EIGHTS];
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
      x[i] = operand<Math>(next[i]);
      if (mask.threshold) x[i].drop(mask.draw(uint32_t(row + 8 * i), uint32_t(column / 8 + t)));
    }
    if (column + Tile::DEPTH_WARPS * DEPTH < end) fetch(column + Tile::DEPTH_WARPS * DEPTH);
    // One pointer that walks down A and a count in 32 bits: addresses and tails of all rank tiles at once would spill.
    const T* at = a.A.at + (rank + g) * a.A.stride + column + 8 * t;
#pragma unroll
    for (int n = 0; n < RANK_TILES; n++, at += MMA_COLUMNS * a.A.stride) {
      if (n * MMA_COLUMNS < ranks) {
        const int64_t valid = n * MMA_COLUMNS + g < ranks ? a.A.columns - column - 8 * t : 0;
        const Eight<T> w = operand<Math>(Eight<T>::load(at, valid, a.A.vector));
#pragma unroll
        for (int i = 0; i < Tile::ROW_TILES; i++) multiply<Math>(sums[i][n], x[2 * i], x[2 * i + 1], w);
      }
    }
  }

  add_depth_warps<Tile>(sums, row_warp, depth_warp);
  if (depth_warp > 0) return;
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    const int64_t m = row + 8 * i;
    if (m >= a.x.rows) continue;
    float* const partials = a.partials ? a.partials + (blockIdx.y * a.x.rows + m) * a.A.rows + rank : nullptr;
    T* const S = a.S + m * a.S_stride + rank;
#pragma unroll
    for (int n = 0; n < 2 * RANK_TILES; n++) {
      const int j = n / 2 * MMA_COLUMNS + 2 * t + n % 2;
      const float sum = sums[i / 2][n / 2][i % 2 * 2 + n % 2];
      if (j >= ranks) continue;
      if (partials) {
        store(partials + j, sum);
      } else {
        store(S + j, from_float<T>(a.scale * sum));
      }
    }
  }
}

/// The depth in slices: as many as make about two blocks for each of 128 multiprocessors, but none of fewer than four
/// steps a warp.
Cut slices(int64_t M, int64_t K) {
  constexpr int64_t BLOCKS = 256, ROWS = ShrinkSmall::ROWS, STEP = DEPTH * ShrinkSmall::DEPTH_WARPS;
  return Cut::into(K, BLOCKS / parts_of(M > 0 ? M : 1, ROWS), 4 * STEP, STEP);
}

template <class Math, class Tile>
Status launch_tile(const Launch& launch, const Shrink<typename Math::Element>& a, int64_t parts) {
  const Blocks grid(parts_of(a.x.rows, Tile::ROWS), parts, parts_of(a.A.rows, Tile::RANK));
  if (a.x.vector && a.A.vector) return LAUNCH((shrink_kernel<Math, Tile, true>), grid, Tile::THREADS, 0, launch, a);
  return LAUNCH((shrink_kernel<Math, Tile, false>), grid, Tile::THREADS, 0, launch, a);
}

template <class Math>
Status launch_shrink(const Launch& launch, const Shrink<typename Math::Element>& a, int64_t parts) {
  if constexpr (!Math::FMA) {  // FMA by shuffles takes longer than another look at x
    if (a.A.rows > ShrinkMiddle::RANK) return launch_tile<Math, ShrinkLarge>(launch, a, parts);
    if (a.A.rows > ShrinkSmall::RANK) return launch_tile<Math, ShrinkMiddle>(launch, a, parts);
  }
  return launch_tile<Math, ShrinkSmall>(launch, a, parts);
}

}  // namespace

int64_t lora_shrink_workspace(DType, int64_t M, int64_t K, int64_t r) {
  const int64_t parts = slices(M, K).parts;
  return parts > 1 ? parts * M * r * int64_t(sizeof(float)) : 0;
}

Status lora_shrink(const Launch& launch, DType dtype, ConstMatrix x, ConstMatrix A, Matrix S, DeviceMask mask,
                   bool tf32, void* workspace) {
  const int64_t M = x.rows, K = x.columns, r = A.rows;
  Check check("lora_shrink");
  check.matrix("x", x, M, K).matrix("A", A, r, K).matrix("S", S, M, r).mask(mask, M);
  check.blocks(parts_of(M, ShrinkSmall::ROWS)).workspace(workspace, lora_shrink_workspace(dtype, M, K, r) > 0);
  if (!check.status()) return check.status();
  if (M == 0 || r == 0) return {};

  return with_math(dtype, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    const Cut cut = slices(M, K);
    float* const partials = cut.parts > 1 ? static_cast<float*>(workspace) : nullptr;
    const Shrink<T> a{view<T>(x), view<T>(A), static_cast<T*>(S.data), S.stride, partials,
                      cut.length, mask,       mask_scale(mask)};
    if (Status status = launch_shrink<Math>(launch, a, cut.parts); !status || !partials) return status;
    const PartialSums<T> sums{partials, cut.parts, M, r, a.scale, a.S, a.S_stride};
    return LAUNCH(add_up_kernel<T>, add_up_grid(sums.size()), ADD_UP_THREADS, 0, launch, sums);
  });
}

}  // namespace llmbuilder::gpu
