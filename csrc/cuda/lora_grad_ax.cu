// dA = dS^T drop(x) and dX0 = mask * (dS A): x is read once, and the mask drawn once for both.
//
//                        columns ->
//               |  rows  |      +--------------+-----     A block stays on its columns and walks down its slab of
//      ranks    v        v      |      A       |          rows, ROWS at a time:
//      +--------+               +--------------+-----
//      |   dS   |  a tile       |  x, then dX  |  the     1  x to registers, asked for a tile ahead; one Philox call
//      +--------+               +--------------+  next       for eight columns; what it keeps to shared memory
//      |        |  slab         |              |  block   2  dA += dS^T x, in registers until the slab's end
//      |        |               |              |          3  dX = dS A, over the ranks
//      +--------+               +--------------+-----     4  dX, through x's place in shared memory, to the threads
//      |        |  next slab    |              |             that drew its mask, and out by 16 bytes
//
// Warps share dA by ranks and columns, and dX by rows and columns. At the slab's end dA goes to the workspace, and a
// second launch adds the slabs in order. The number of slabs depends on the shape alone: a shape has one result.
//
// Traffic in bytes, an element having e of them; dS and A come nearly always from the second-level cache:
//
//     x, and dX0 where x needs a gradient    e M K each, once
//     dS                                     e M r * blocks of columns
//     A                                      e r K * slabs
//     partial sums, written and read         4 r K * slabs * 2      slabs of 4 r rows or more: at most 2 M K of several
//     dA                                     4 r K
//
// More than 256 ranks (128 in fp32) take another run for each further 256: over x again, and adding to dX0.
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mask.h"
#include "cuda/mma.h"
#include "cuda/partials.h"
#include "cuda/staged.h"
#include "cuda/tiles.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

template <class T>
struct GradAX {
  View<T> x, dS, A;
  T* dX;  // or null
  int64_t dX_stride;
  bool dX_vector;  // as View's
  int64_t slab;
  float* partials;  // [slabs, r, K]
  DeviceMask mask;
  float scale;
  bool add;  // to dX
};

/// A tile of x, or of dX, as the block's threads share it: each has the same Eights of every tile.
template <class T, class Tile>
struct Share {
  static constexpr int ACROSS = Tile::COLUMNS / 8, ALL = Tile::ROWS * ACROSS;
  static constexpr int EIGHTS = (ALL + Tile::THREADS - 1) / Tile::THREADS;
  Eight<T> x[EIGHTS];
  uint32_t kept[EIGHTS];  // bit i: the mask keeps column i of the Eight

  /// f(which, row, column): this thread's Eights, by their place in the tile.
  template <class F>
  DEVICE static void each(F f) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int i = e * Tile::THREADS + threadIdx.x;
      if (ALL % Tile::THREADS == 0 || i < ALL) f(e, i / ACROSS, i % ACROSS * 8);
    }
  }

  DEVICE void load(const View<T>& from, int64_t row, int64_t column) {
    each([&](int e, int r, int c) { x[e] = from.eight(row + r, column + c); });
  }

  /// Draws the mask of the tile at (row, column), and drops from x.
  DEVICE void drop(const Mask& mask, int64_t row, int64_t column) {
    each([&](int e, int r, int c) {
      kept[e] = 0xff;
      if (mask.threshold == 0) return;
      const Keep keep = mask.draw(uint32_t(row + r), uint32_t((column + c) / 8));
      x[e].drop(keep);
      kept[e] = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) kept[e] |= uint32_t(keep(i)) << i;
    });
  }
};

/// dX[row ..., column ...] = the tile's values where the mask keeps, and 0 elsewhere.
template <class T, class Tile>
DEVICE void write_dX(const GradAX<T>& a, const Staged<T, Tile::ROWS, Tile::COLUMNS>& tile, const Share<T, Tile>& share,
                     int64_t row, int64_t column) {
  share.each([&](int e, int r, int c) {
    const int64_t valid = row + r < a.x.rows ? a.x.columns - (column + c) : 0;
    T* to = a.dX + (row + r) * a.dX_stride + column + c;
    Eight<T> out = Eight<T>::load(tile.place(r, c), 8, true);
    const Eight<T> before = Eight<T>::load(to, a.add ? valid : 0, a.dX_vector);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const bool keep = share.kept[e] >> i & 1;
      out.set(i, keep ? out.get(i) : from_bits<T>(0));
      if (a.add) out.set(i, from_float<T>(to_float(before.get(i)) + to_float(out.get(i))));
    }
    out.store(to, valid, a.dX_vector);
  });
}

/// What a block keeps in shared memory: A, a tile of x or dX, and two of dS, one in use and one for the next rows.
template <class T, class Tile>
struct Memory {
  using OfA = Staged<T, Tile::RANK, Tile::COLUMNS>;
  using OfX = Staged<T, Tile::ROWS, Tile::COLUMNS>;
  using OfS = Staged<T, Tile::ROWS, Tile::RANK>;
  static constexpr size_t BYTES = OfA::BYTES + OfX::BYTES + 2 * OfS::BYTES;
};

template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::THREADS, 2) grad_ax_kernel(GradAX<typename Math::Element> a) {
  using T = typename Math::Element;
  DYN_SMEM(shared);
  const typename Memory<T, Tile>::OfA A{reinterpret_cast<T*>(shared)};
  const typename Memory<T, Tile>::OfX x{A.end()};
  using OfS = typename Memory<T, Tile>::OfS;
  T* const dS = x.end();
  const int warp = threadIdx.x / WARP, rank_warp = warp / Tile::COLUMN_WARPS, row_warp = warp / Tile::DX_COLUMN_WARPS;
  const int rank = rank_warp * 16 * Tile::RANK_TILES, part = warp % Tile::COLUMN_WARPS * 8 * Tile::COLUMN_TILES;
  const int dX_row = row_warp * 16 * Tile::DX_ROW_TILES,
            dX_column = warp % Tile::DX_COLUMN_WARPS * 8 * Tile::DX_COLUMN_TILES;
  const int64_t column = int64_t(blockIdx.x) * Tile::COLUMNS, begin = blockIdx.y * a.slab;
  const int64_t end = begin + a.slab < a.x.rows ? begin + a.slab : a.x.rows;
  const Mask mask(a.mask);

  float dA[Tile::RANK_TILES][Tile::COLUMN_TILES][4] = {};
  Share<T, Tile> share;
  share.load(a.x, begin, column);
  A.fill(a.A, 0, column);
  OfS{dS}.fill(a.dS, begin, 0);
  cp_async_commit();
  int now = 0;
  for (int64_t row = begin; row < end; row += Tile::ROWS, now ^= 1) {
    const OfS dS_now{dS + now * OfS::SIZE};
    share.drop(mask, row, column);
    share.each([&](int e, int r, int c) { share.x[e].store(x.place(r, c), 8, true); });
    cp_async_wait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the one before
    if (row + Tile::ROWS < end) {
      OfS{dS + (now ^ 1) * OfS::SIZE}.fill(a.dS, row + Tile::ROWS, 0);
      cp_async_commit();
      share.load(a.x, row + Tile::ROWS, column);
    }
    multiply_tiles<Math, true, Tile::ROWS>(dA, dS_now.from(0, rank), x.from(0, part));
    if (a.dX) {
      float dX[Tile::DX_ROW_TILES][Tile::DX_COLUMN_TILES][4] = {};
      multiply_tiles<Math, false, Tile::RANK>(dX, dS_now.from(dX_row, 0), A.from(0, dX_column));
      __syncthreads();  // x is read: its place is free
      put(x, dX_row, dX_column, dX, a.scale);
      __syncthreads();
      write_dX(a, x, share, row, column);
    } else {
      __syncthreads();
    }
  }
  cp_async_wait<0>();  // of a slab without rows
  const int64_t ranks = a.A.rows, columns = a.A.columns;
  store_sums(dA, a.partials + (blockIdx.y * ranks + rank) * columns + column + part, ranks - rank,
             columns - column - part, columns);
}

/// A block takes Tile::COLUMNS columns of one of the slabs of rows.
template <class Tile>
struct Plan {
  int64_t across;
  Cut slabs;

  Plan(int64_t M, int64_t K)
      : across((K + Tile::COLUMNS - 1) / Tile::COLUMNS),
        slabs(Cut::into(M, across ? (Tile::BLOCKS + across - 1) / across : 1, 4 * Tile::RANK, Tile::ROWS)) {}
};

template <class Math, class Tile>
Status one_run(const Launch& launch, GradAX<typename Math::Element> a, float* dA) {
  using T = typename Math::Element;
  const Plan<Tile> plan(a.x.rows, a.x.columns);
  a.slab = plan.slabs.length;
  const Blocks grid(plan.across, plan.slabs.parts);
  if (Status status = LAUNCH((grad_ax_kernel<Math, Tile>), grid, Tile::THREADS, Memory<T, Tile>::BYTES, launch, a);
      !status)
    return status;
  const PartialSums<float> sums{a.partials, plan.slabs.parts, a.A.rows, a.x.columns, a.scale, dA, a.x.columns};
  return LAUNCH(add_up_kernel<float>, add_up_grid(sums.size()), ADD_UP_THREADS, 0, launch, sums);
}

}  // namespace

Status lora_grad_ax(const Launch& launch, DType dtype, ConstMatrix x, ConstMatrix dS, ConstMatrix A, DeviceMask mask,
                    float* dA, Matrix dX, bool tf32, void* workspace) {
  Check check("lora_grad_ax");
  check.that(A.rows > 0, "the rank is 0")
      .matrix("x", x, x.rows, x.columns)
      .matrix("dS", dS, x.rows, A.rows)
      .matrix("A", A, A.rows, x.columns)
      .mask(mask, x.rows)
      .pointer("dA", dA, x.columns > 0)
      .workspace(workspace, x.columns > 0);
  if (dX.data) check.matrix("dX", dX, x.rows, x.columns);
  if (!check.status() || x.columns == 0) return check.status();
  return with_math(dtype, tf32, [&](auto math) {
    using T = typename decltype(math)::Element;
    return each_run<sizeof(T)>(A.rows, [&](int64_t first, int64_t ranks) {
      const ConstMatrix some_A{static_cast<const T*>(A.data) + first * A.stride, ranks, A.columns, A.stride};
      const ConstMatrix some_dS{static_cast<const T*>(dS.data) + first, dS.rows, ranks, dS.stride};
      const GradAX<T> a{view<T>(x),
                        view<T>(some_dS),
                        view<T>(some_A),
                        static_cast<T*>(dX.data),
                        dX.stride,
                        aligned<T>(dX),
                        0,
                        static_cast<float*>(workspace),
                        mask,
                        mask_scale(mask),
                        first > 0};
      return with_grad_ax_tile<sizeof(T)>(
          ranks, [&](auto tile) { return one_run<decltype(math), decltype(tile)>(launch, a, dA + first * x.columns); });
    });
  });
}

int64_t lora_grad_ax_workspace(DType dtype, int64_t M, int64_t K, int64_t r) {
  return workspace_of_runs(dtype, r, [&](auto size, int64_t ranks) {
    return with_grad_ax_tile<size>(ranks,
                                   [&](auto tile) { return Plan<decltype(tile)>(M, K).slabs.parts * ranks * K; });
  });
}

}  // namespace llmbuilder::gpu
