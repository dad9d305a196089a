// The tile parameters of every kernel, in one table. Counts of registers and what they leave of an SM: docs/kernels.md.
#pragma once
#include <cstdint>

namespace llmbuilder::gpu {

/// lora_shrink: a warp takes ROW_TILES * 16 rows and every DEPTH_WARPS-th 32 columns, and holds sums for RANK ranks.
/// RANK is the largest rank that a row serves; larger ones take more blocks of the last.
template <int RANK_, int ROW_TILES_, int ROW_WARPS_, int DEPTH_WARPS_, int BLOCKS_>
struct ShrinkTile {
  static constexpr int RANK = RANK_, ROW_TILES = ROW_TILES_, ROW_WARPS = ROW_WARPS_, DEPTH_WARPS = DEPTH_WARPS_;
  /// Blocks that an SM must have registers for; fp32's Eights take twice as many.
  template <class T>
  static constexpr int blocks() {
    return sizeof(T) == 2 ? BLOCKS_ : 1;
  }
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, THREADS = 32 * ROW_WARPS * DEPTH_WARPS;
};
//                             rank   16 rows x   warps on rows   warps on depth   blocks of an SM
using ShrinkSmall = ShrinkTile<32,    2,          2,              4,               2>;
using ShrinkMiddle = ShrinkTile<128,  1,          4,              2,               2>;
using ShrinkLarge = ShrinkTile<256,   1,          8,              1,               1>;

/// lora_expand: a warp takes ROW_TILES * 16 rows and COLUMN_GROUPS * 32 columns.
struct ExpandTile {
  static constexpr int ROW_TILES = 2, COLUMN_GROUPS = 2, ROW_WARPS = 4, COLUMN_WARPS = 2, BLOCKS = 2;
  static constexpr int ROWS = 16 * ROW_TILES * ROW_WARPS, COLUMNS = 32 * COLUMN_GROUPS * COLUMN_WARPS;
  static constexpr int THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
};

/// lora_fused: a block takes SIDE rows by SIDE columns in 2 x 4 warps, and has STAGES tiles of depth in flight.
struct FusedTile {
  static constexpr int SIDE = 128, DEPTH_BYTES = 64, STAGES = 3, ROW_WARPS = 2, THREADS = 256, BLOCKS = 2;
};

}  // namespace llmbuilder::gpu
