// The tile parameters of every kernel, in one table. What they cost in registers and leave of a multiprocessor is in
// benchmarks/results/codegen.csv.
#pragma once
#include <cstdint>

#include "cuda/device.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {

/// How many parts cover a size.
HD constexpr int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

/// lora_shrink: a warp takes ROW_TILES * 16 rows and every DEPTH_WARPS-th 32 columns, and holds the sums of up to RANK
/// ranks. Ranks above the largest tile's take further blocks.
template <int RANK_, int ROW_TILES_, int ROW_WARPS_, int DEPTH_WARPS_, int BLOCKS_>
struct ShrinkTile {
  static constexpr int RANK = RANK_, ROW_TILES = ROW_TILES_, ROW_WARPS = ROW_WARPS_, DEPTH_WARPS = DEPTH_WARPS_;
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, THREADS = 32 * ROW_WARPS * DEPTH_WARPS;

  /// Blocks that a multiprocessor must have registers for; the operands of fp32 take twice as many.
  template <class T>
  static constexpr int blocks() {
    return sizeof(T) == 2 ? BLOCKS_ : 1;
  }
};
// clang-format off
//                              ranks, 16 rows x, row warps, depth warps, blocks
using ShrinkSmall  = ShrinkTile<32,    2,         2,         4,           2>;
using ShrinkMiddle = ShrinkTile<64,    1,         4,         2,           2>;
using ShrinkLarge  = ShrinkTile<256,   1,         8,         1,           1>;
// clang-format on

/// lora_expand: a warp takes ROW_TILES * 16 rows and COLUMN_GROUPS * 32 columns, which are 128 bytes of a row.
template <int SIZE>
struct ExpandTile {
  static constexpr int ROW_TILES = 2, COLUMN_GROUPS = 4 / SIZE, ROW_WARPS = 4, COLUMN_WARPS = 2, BLOCKS = 2;
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, COLUMNS = 32 * COLUMN_GROUPS * COLUMN_WARPS;
  static constexpr int THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
};

/// lora_fused: a block takes SIDE rows by SIDE columns in 2 x 4 warps, and keeps STAGES tiles of depth in shared
/// memory: 48 KiB, so that two blocks fit where a multiprocessor has 100.
struct FusedTile {
  static constexpr int SIDE = 128, DEPTH_BYTES = 64, STAGES = 3, ROW_WARPS = 2, THREADS = 256, BLOCKS = 2;
};

/// Ranks that one run of a gradient's kernels serves, with elements of SIZE bytes.
template <int SIZE>
constexpr int64_t RANKS_OF_RUN = 512 / SIZE;

/// Calls f(first rank, ranks) for each run, until one is not OK.
template <int SIZE, class F>
Status each_run(int64_t rank, F f) {
  for (int64_t first = 0; first < rank; first += RANKS_OF_RUN<SIZE>) {
    const int64_t rest = rank - first;
    if (Status status = f(first, rest < RANKS_OF_RUN<SIZE> ? rest : RANKS_OF_RUN<SIZE>); !status) return status;
  }
  return {};
}

/// lora_grad_ax: a block takes COLUMNS columns, ROWS rows at a time. Its warps share dA, RANK_WARPS by COLUMN_WARPS of
/// RANK_TILES * 16 by COLUMN_TILES * 8; and dX, ROW_WARPS by the rest, of DX_ROW_TILES * 16 by DX_COLUMN_TILES * 8.
/// Rows are cut into slabs until there are about BLOCKS blocks.
template <int RANK_, int RANK_WARPS, int COLUMN_WARPS_, int COLUMN_TILES_, int ROWS_, int ROW_WARPS, int BLOCKS_>
struct GradAXTile {
  static constexpr int RANK = RANK_, COLUMN_WARPS = COLUMN_WARPS_, COLUMN_TILES = COLUMN_TILES_, ROWS = ROWS_;
  static constexpr int RANK_TILES = RANK / 16 / RANK_WARPS, COLUMNS = 8 * COLUMN_TILES * COLUMN_WARPS;
  static constexpr int WARPS = RANK_WARPS * COLUMN_WARPS, THREADS = 32 * WARPS, DX_COLUMN_WARPS = WARPS / ROW_WARPS;
  static constexpr int DX_ROW_TILES = ROWS / 16 / ROW_WARPS, DX_COLUMN_TILES = COLUMNS / 8 / DX_COLUMN_WARPS;
  static constexpr int BLOCKS = BLOCKS_;
};

/// Calls f with the tile for a rank. Tiles of x are 8 KiB; 4 beside 256 ranks, where A leaves no more room on GPUs with
/// 99 KiB.
template <int SIZE, class F>
auto with_grad_ax_tile(int64_t rank, F f) {
  constexpr int LINE = 128 / SIZE;
  // clang-format off
  //                                       ranks, rank warps, column warps, columns / 8, rows, row warps, blocks
  if (rank <= 16) return f(GradAXTile<     16,    1,          4,            4,           32,   1,         256>());
  if (rank <= 32) return f(GradAXTile<     32,    1,          4,            4,           32,   1,         256>());
  if (rank <= 64) return f(GradAXTile<     64,    2,          2,            4,           LINE, 2,         256>());
  if (SIZE == 4 || rank <= 128)
                  return f(GradAXTile<     128,   4,          1,            8,           LINE, 2,         256>());
  if constexpr (SIZE == 2)
                  return f(GradAXTile<     256,   8,          1,            8,           32,   2,         128>());
  // clang-format on
}

/// lora_grad_sb up to 32 ranks: a block takes COLUMNS columns, ROWS rows at a time. Four warps share dB by columns, and
/// dS two by two, by rows and ranks. The wider a block, the fewer parts of dS; 16 ranks leave room for twice the width.
template <int RANK_, int COLUMNS_>
struct GradSBTile {
  static constexpr int RANK = RANK_, COLUMNS = COLUMNS_, ROWS = 32, THREADS = 128, BLOCKS = 128;
};
constexpr int64_t ONE_PASS_RANK = 32;

template <int SIZE, class F>
auto with_grad_sb_tile(int64_t rank, F f) {
  return rank <= 16 ? f(GradSBTile<16, 1024 / SIZE>()) : f(GradSBTile<32, 512 / SIZE>());
}

/// lora_grad_sb above: a block takes ACROSS rows of dY for dS, or columns for dB, and sums over DEPTH at a time. A warp
/// has 32 of them, by RANK_TILES * 8 ranks.
template <int RANK_, int SIZE, int RANK_TILES_, int BLOCKS_>
struct GradSideTile {
  static constexpr int RANK = RANK_, RANK_TILES = RANK_TILES_, RANK_WARPS = RANK / 8 / RANK_TILES, BLOCKS = BLOCKS_;
  static constexpr int ACROSS = 64, DEPTH = 128 / SIZE, THREADS = ACROSS / 32 * RANK_WARPS * 32;
};

template <int SIZE, class F>
auto with_grad_side_tile(int64_t rank, F f) {
  if (rank <= 64) return f(GradSideTile<64, SIZE, 4, 256>());
  if (SIZE == 4 || rank <= 128) return f(GradSideTile<128, SIZE, 8, 256>());
  if constexpr (SIZE == 2) return f(GradSideTile<256, SIZE, 8, 128>());
}

}  // namespace llmbuilder::gpu
