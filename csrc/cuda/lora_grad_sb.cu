// dS = scaling dY B, a sum over columns of dY, and dB = scaling dY^T S, a sum over its rows.
//
// Up to 32 ranks dY is read once for both:
//
//                          columns ->
//      ranks    |  rows  |      +--------------+-----     A block stays on its columns and walks down its slab of
//      +------+ v        v      |  B, stays    |          rows, ROWS at a time, which come by cp.async a tile ahead:
//      |  S   |  a tile         +--------------+-----
//      +------+                 |      dY      |  the     1  dS of these rows over the block's columns = dY B:
//      |      |  slab           +--------------+  next       complete, and to the workspace, one part of dS for each
//      |      |                 |              |  block      block of columns
//      +------+                 +--------------+-----     2  dB += dY^T S, in registers until the slab's end, then to
//      |      |  next slab      |              |             the workspace, one part of dB for each slab
//
// A part of dS costs 4 r bytes for each row of a block's columns, so that above 32 ranks two passes over dY are
// cheaper. Each keeps its sums in registers for the length of its walk, down for dB and to the right for dS:
//
//                        +------+------+----                                  +------+
//     dS, 64 rows by     |  dY  | next |   B beside it    dB, 64 columns by   |  dY  |   S beside it
//     all ranks          +------+------+----              all ranks           +------+
//                                                                             | next |
//
// A last launch adds the parts of both in order. How many there are depends on the shape alone: a shape has one result.
//
// Traffic in bytes, an element having e of them; B and S come nearly always from the second-level cache:
//
//                                     in one pass                      in two
//     dY                              e M N                            2 e M N
//     B                               e N r * slabs                    e N r * M / 64
//     S                               e M r * blocks of columns        e M r * N / 64
//     parts of dS, written and read   4 M r * blocks of columns * 2    4 M r * slabs of columns * 2
//     parts of dB, written and read   4 N r * slabs * 2                4 N r * slabs of rows * 2
//     dS and dB                       e M r + 4 N r                    e M r + 4 N r
//
// More than 256 ranks (128 in fp32) take another run for each further 256.
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/partials.h"
#include "cuda/staged.h"
#include "cuda/tiles.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

template <class T>
struct GradSB {
  View<T> dY, S, B;
  int64_t slab;
  float* dS;  // [blocks of columns, M, r]
  float* dB;  // [slabs, N, r]
};

/// What a block keeps in shared memory: B, and two tiles of dY and of S, one in use and one for the next rows.
template <class T, class Tile>
struct Memory {
  using OfB = Staged<T, Tile::COLUMNS, Tile::RANK>;
  using OfY = Staged<T, Tile::ROWS, Tile::COLUMNS>;
  using OfS = Staged<T, Tile::ROWS, Tile::RANK>;
  static constexpr size_t BYTES = OfB::BYTES + 2 * (OfY::BYTES + OfS::BYTES);
};

template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::THREADS) grad_sb_kernel(GradSB<typename Math::Element> a) {
  using T = typename Math::Element;
  using OfY = typename Memory<T, Tile>::OfY;
  using OfS = typename Memory<T, Tile>::OfS;
  constexpr int RANKS = Tile::RANK / 2, COLUMNS = Tile::COLUMNS / 4;  // a warp's, of dS and of dB
  DYN_SMEM(shared);
  const typename Memory<T, Tile>::OfB B{reinterpret_cast<T*>(shared)};
  T *const dY = B.end(), *const S = dY + 2 * OfY::SIZE;
  const int warp = threadIdx.x / WARP, warp_row = warp % 2 * 16, warp_rank = warp / 2 * RANKS,
            warp_column = warp * COLUMNS;
  const int64_t column = int64_t(blockIdx.x) * Tile::COLUMNS, begin = blockIdx.y * a.slab, M = a.dY.rows,
                r = a.B.columns;
  const int64_t end = begin + a.slab < M ? begin + a.slab : M;

  const auto fetch = [&](int64_t row, int buffer) {
    OfY{dY + buffer * OfY::SIZE}.fill(a.dY, row, column);
    OfS{S + buffer * OfS::SIZE}.fill(a.S, row, 0);
    cp_async_commit();
  };
  float dB[COLUMNS / 16][Tile::RANK / 8][4] = {};
  B.fill(a.B, column, 0);
  fetch(begin, 0);
  int now = 0;
  for (int64_t row = begin; row < end; row += Tile::ROWS, now ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the one before
    if (row + Tile::ROWS < end) fetch(row + Tile::ROWS, now ^ 1);
    const OfY tile{dY + now * OfY::SIZE};
    float dS[1][RANKS / 8][4] = {};
    multiply_tiles<Math, false, Tile::COLUMNS>(dS, tile.from(warp_row, 0), B.from(0, warp_rank));
    store_sums(dS, a.dS + (blockIdx.x * M + row + warp_row) * r + warp_rank, M - row - warp_row, r - warp_rank, r);
    multiply_tiles<Math, true, Tile::ROWS>(dB, tile.from(0, warp_column), OfS{S + now * OfS::SIZE}.from(0, 0));
  }
  cp_async_wait<0>();  // of a slab without rows
  const int64_t first = column + warp_column;
  store_sums(dB, a.dB + (blockIdx.y * a.B.rows + first) * r, a.B.rows - first, r, r);
}

/// out[i, j] = the sum over k of dY[i, k] right[k, j]; DOWN: of dY[k, i] right[k, j].
template <class T>
struct GradSide {
  View<T> dY, right;
  int64_t slab;
  float* out;  // [slabs of k, i, j]
};

/// Two tiles of each, as above.
template <class T, class Tile, bool DOWN>
struct SideMemory {
  using OfY = Staged<T, DOWN ? Tile::DEPTH : Tile::ACROSS, DOWN ? Tile::ACROSS : Tile::DEPTH>;
  using OfRight = Staged<T, Tile::DEPTH, Tile::RANK>;
  static constexpr size_t BYTES = 2 * (OfY::BYTES + OfRight::BYTES);
};

template <class Math, class Tile, bool DOWN>
__global__ void __launch_bounds__(Tile::THREADS) grad_side_kernel(GradSide<typename Math::Element> a) {
  using T = typename Math::Element;
  using OfY = typename SideMemory<T, Tile, DOWN>::OfY;
  using OfRight = typename SideMemory<T, Tile, DOWN>::OfRight;
  DYN_SMEM(shared);
  T *const dY = reinterpret_cast<T*>(shared), *const right = dY + 2 * OfY::SIZE;
  const int warp = threadIdx.x / WARP, warp_rank = warp % Tile::RANK_WARPS * Tile::RANK_TILES * 8,
            warp_across = warp / Tile::RANK_WARPS * 32;
  const int64_t across = int64_t(blockIdx.x) * Tile::ACROSS, begin = blockIdx.y * a.slab, depth = a.right.rows;
  const int64_t end = begin + a.slab < depth ? begin + a.slab : depth;

  const auto fetch = [&](int64_t k, int buffer) {
    OfY{dY + buffer * OfY::SIZE}.fill(a.dY, DOWN ? k : across, DOWN ? across : k);
    OfRight{right + buffer * OfRight::SIZE}.fill(a.right, k, 0);
    cp_async_commit();
  };
  float sums[2][Tile::RANK_TILES][4] = {};
  fetch(begin, 0);
  int now = 0;
  for (int64_t k = begin; k < end; k += Tile::DEPTH, now ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tiles are complete, and nobody reads the ones before
    if (k + Tile::DEPTH < end) fetch(k + Tile::DEPTH, now ^ 1);
    const OfY tile{dY + now * OfY::SIZE};
    multiply_tiles<Math, DOWN, Tile::DEPTH>(sums, DOWN ? tile.from(0, warp_across) : tile.from(warp_across, 0),
                                            OfRight{right + now * OfRight::SIZE}.from(0, warp_rank));
  }
  cp_async_wait<0>();  // of a slab without any depth
  const int64_t all = DOWN ? a.dY.columns : a.dY.rows, first = across + warp_across, r = a.right.columns;
  store_sums(sums, a.out + (blockIdx.y * all + first) * r + warp_rank, all - first, r - warp_rank, r);
}

int64_t blocks_of(int64_t size, int64_t block) { return size > block ? (size + block - 1) / block : 1; }

/// A grid of blocks side by side, each with one slab of what it walks along.
struct Grid {
  int64_t blocks;
  Cut slabs;

  template <class Tile>
  static Grid one_pass(int64_t M, int64_t N) {
    const int64_t blocks = blocks_of(N, Tile::COLUMNS);
    return {blocks, Cut::into(M, blocks_of(Tile::BLOCKS, blocks), 4 * Tile::RANK, Tile::ROWS)};
  }
  template <class Tile>
  static Grid side(int64_t across, int64_t depth) {
    const int64_t blocks = blocks_of(across, Tile::ACROSS);
    return {blocks, Cut::into(depth, blocks_of(Tile::BLOCKS, blocks), 4 * Tile::RANK, Tile::DEPTH)};
  }
  operator Blocks() const { return {blocks, slabs.parts}; }
};

/// How many parts there are of dS and of dB.
struct Parts {
  int64_t dS, dB;

  template <int SIZE>
  static Parts of(int64_t M, int64_t N, int64_t r) {
    if (r <= ONE_PASS_RANK)
      return with_grad_sb_tile<SIZE>(r, [&](auto tile) {
        const Grid grid = Grid::one_pass<decltype(tile)>(M, N);
        return Parts{grid.blocks, grid.slabs.parts};
      });
    return with_grad_side_tile<SIZE>(r, [&](auto tile) {
      return Parts{Grid::side<decltype(tile)>(M, N).slabs.parts, Grid::side<decltype(tile)>(N, M).slabs.parts};
    });
  }
};

template <class Math, class T>
Status one_pass(const Launch& launch, GradSB<T> a) {
  return with_grad_sb_tile<sizeof(T)>(a.B.columns, [&](auto tile) {
    using Tile = decltype(tile);
    const Grid grid = Grid::one_pass<Tile>(a.dY.rows, a.dY.columns);
    a.slab = grid.slabs.length;
    return LAUNCH((grad_sb_kernel<Math, Tile>), grid, Tile::THREADS, Memory<T, Tile>::BYTES, launch, a);
  });
}

template <class Math, bool DOWN, class T>
Status side(const Launch& launch, GradSide<T> a) {
  return with_grad_side_tile<sizeof(T)>(a.right.columns, [&](auto tile) {
    using Tile = decltype(tile);
    const Grid grid = Grid::side<Tile>(DOWN ? a.dY.columns : a.dY.rows, a.right.rows);
    a.slab = grid.slabs.length;
    return LAUNCH((grad_side_kernel<Math, Tile, DOWN>), grid, Tile::THREADS, SideMemory<T, Tile, DOWN>::BYTES, launch,
                  a);
  });
}

template <class Math, class T>
Status both(const Launch& launch, const GradSB<T>& a) {
  if (a.B.columns <= ONE_PASS_RANK) return one_pass<Math>(launch, a);
  if (a.dY.rows > 0)
    if (Status status = side<Math, false>(launch, GradSide<T>{a.dY, a.B, 0, a.dS}); !status) return status;
  if (a.dY.columns > 0) return side<Math, true>(launch, GradSide<T>{a.dY, a.S, 0, a.dB});
  return {};
}

/// Columns first ... first + ranks.
template <class T>
View<T> some(const ConstMatrix& matrix, int64_t first, int64_t ranks) {
  return view<T>({static_cast<const T*>(matrix.data) + first, matrix.rows, ranks, matrix.stride});
}

}  // namespace

Status lora_grad_sb(const Launch& launch, DType dtype, ConstMatrix dY, ConstMatrix S, ConstMatrix B, float scaling,
                    Matrix dS, float* dB, bool tf32, void* workspace) {
  const int64_t M = dY.rows, N = dY.columns, r = B.columns;
  Check check("lora_grad_sb");
  check.that(r > 0, "the rank is 0")
      .matrix("dY", dY, M, N)
      .matrix("S", S, M, r)
      .matrix("B", B, N, r)
      .matrix("dS", dS, M, r)
      .pointer("dB", dB, N > 0)
      .workspace(workspace, M + N > 0)
      .blocks(add_up_grid((M + N) * r).x);
  if (!check.status() || M + N == 0) return check.status();
  return with_math(dtype, tf32, [&](auto math) {
    using T = typename decltype(math)::Element;
    return each_run<sizeof(T)>(r, [&](int64_t first, int64_t ranks) {
      const Parts parts = Parts::of<sizeof(T)>(M, N, ranks);
      float *const dS_parts = static_cast<float*>(workspace), *const dB_parts = dS_parts + parts.dS * M * ranks;
      const GradSB<T> a{view<T>(dY), some<T>(S, first, ranks), some<T>(B, first, ranks), 0, dS_parts, dB_parts};
      if (Status status = both<decltype(math)>(launch, a); !status) return status;
      const PartialSums<T> to_dS{dS_parts, parts.dS, M, ranks, scaling, static_cast<T*>(dS.data) + first, dS.stride};
      const PartialSums<float> to_dB{dB_parts, parts.dB, N, ranks, scaling, dB + first, r};
      const Blocks grid = add_up_grid(to_dS.size() + to_dB.size());
      return LAUNCH((add_up_both_kernel<T, float>), grid, ADD_UP_THREADS, 0, launch, to_dS, to_dB);
    });
  });
}

int64_t lora_grad_sb_workspace(DType dtype, int64_t M, int64_t N, int64_t r) {
  return workspace_of_runs(dtype, r, [&](auto size, int64_t ranks) {
    const Parts parts = Parts::of<size>(M, N, ranks);
    return (parts.dS * M + parts.dB * N) * ranks;
  });
}

}  // namespace llmbuilder::gpu
