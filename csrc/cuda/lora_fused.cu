// Base and update in one set of accumulators:
//
//     forward     y  = scaling S B^T                 + x W^T + b         W [N, K], B [N, r]: rows are columns of y
//     backward    dX = mask / (1 - p) * (dS A)       + dY W              W [N, K], A [r, K]: rows are depth
//
// The update comes first. When its last tile is in the accumulators they are scaled, or masked and scaled, where they
// stand, and the base is summed on top: no second set of accumulators, no correction afterwards, one pipeline of tiles.
//
//         S | x           depth in tiles of 64 bytes:  update ... update  base  base  base ...
//       +---+--------+    stages of shared memory, filled by cp.async two tiles ahead:
//   128 |   |        |      wait for this tile's copies - barrier - issue the tile after next - ldmatrix, mma
//       +---+--------+    a warp has 64 x 32 of the block's 128 x 128 sums
//
// Rows of a tile are 64 bytes of depth, in four chunks of 16; the chunk's place is XORed with the row, so that the
// eight rows that ldmatrix reads at once lie in different banks. In the backward pass the right operand's tile lies the
// other way, rows of depth, and is turned by ldmatrix.trans (16-bit types) or read word by word (fp32).
//
// D gives a lane pairs of columns of four mma. A transposition within each quad of lanes makes Eights of them: then one
// Philox call masks eight columns, and y is stored by 16 bytes; after masking, the same transposition puts them back.
//
// Traffic: x (or dY) once for each 128 columns of the result, W once for each 128 rows, mostly from the second-level
// cache; the result once. Strict fp32 takes its products from shuffles (mma.h) and is here for completeness.
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/tiles.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

using Tile = FusedTile;
constexpr int CHUNK = 16;                                   // bytes of a cp.async and of a row that ldmatrix reads
constexpr int CHUNKS = Tile::DEPTH_BYTES / CHUNK;           // of a row of depth
constexpr int SIDE_BYTES = Tile::SIDE * Tile::DEPTH_BYTES;  // of one operand's tile
constexpr int STAGE_BYTES = 2 * SIDE_BYTES;
constexpr int ROW_TILES = 4, COLUMN_TILES = 4;  // mma of a warp, in rows and columns

/// Where a chunk of a tile lies. ROW_CHUNKS to a row; rows that are read together must differ in their chunk's bank.
struct Narrow {  // rows of depth bytes: eight rows in turn, two of them in 128 bytes
  static constexpr int ROW_CHUNKS = CHUNKS;
  DEVICE static int place(int row, int chunk) { return row * Tile::DEPTH_BYTES + ((chunk ^ (row >> 1)) & 3) * CHUNK; }
};
template <class T>
struct Wide {  // rows of columns: eight rows of 16-bit elements in turn, four rows by two chunks of fp32
  static constexpr int ROW_CHUNKS = Tile::SIDE * sizeof(T) / CHUNK;
  DEVICE static int place(int row, int chunk) {
    return (row * ROW_CHUNKS + (chunk ^ (sizeof(T) == 2 ? row & 7 : (row & 3) * 2))) * CHUNK;
  }
};

/// Copies the tile at (row, column) of a matrix, with zeros outside.
template <class Layout, class T>
DEVICE void copy_tile(unsigned char* tile, const View<T>& from, int64_t row, int64_t column) {
  constexpr int ELEMENTS = CHUNK / sizeof(T);
  for (int i = threadIdx.x; i < SIDE_BYTES / CHUNK; i += Tile::THREADS) {
    const int r = i / Layout::ROW_CHUNKS, c = i % Layout::ROW_CHUNKS;
    const int64_t valid = row + r < from.rows ? from.columns - column - c * ELEMENTS : 0;
    const T* source = from.at + (row + r) * from.stride + column + c * ELEMENTS;
    T* target = reinterpret_cast<T*>(tile + Layout::place(r, c));
    if (from.vector) {
      cp_async16(target, valid > 0 ? source : from.at, valid > 0);
    } else {
#pragma unroll
      for (int e = 0; e < ELEMENTS; e++) store(target + e, e < valid ? load(source + e) : from_bits<T>(0));
    }
  }
}

template <class T>
struct Fused {
  View<T> left[2], right[2];  // update, base
  T* out;
  int64_t out_stride, M, N;  // of out
  const T* bias;             // or null
  float scale;               // of the update
  DeviceMask mask;           // of the update; threshold 0 for none
  int64_t column_blocks;
  bool vector;
};

/// Turns each quad's v[4]: lane t's v[i] becomes lane i's v[t].
DEVICE void turn(float (&v)[4], int t) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      const bool upper = t & step;
      const float got = __shfl_xor_sync(~0u, upper ? v[i] : v[i + step], step);
      if (upper) {
        v[i] = got;
      } else {
        v[i + step] = got;
      }
    }
  }
}

/// A warp's sums, 64 x 32, as D of 4 x 4 mma.
struct Sums {
  float d[ROW_TILES][COLUMN_TILES][4];

  /// The Eight of row g + 8 i and columns 8 t ... 8 t + 7 ...
  DEVICE void take(int i, int t, float (&values)[8]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = d[i / 2][j][i % 2 * 2 + h];
      turn(v, t);
#pragma unroll
      for (int j = 0; j < 4; j++) values[2 * j + h] = v[j];
    }
  }

  /// ... and back where it was.
  DEVICE void put(int i, int t, const float (&values)[8]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = values[2 * j + h];
      turn(v, t);
#pragma unroll
      for (int j = 0; j < 4; j++) d[i / 2][j][i % 2 * 2 + h] = v[j];
    }
  }
};

/// Where an element of the right operand lies; TURNED: rows of its tile are depth.
template <class T, bool TURNED>
DEVICE const T* right_element(const unsigned char* right, int column, int k) {
  constexpr int ELEMENTS = CHUNK / sizeof(T);
  const unsigned char* chunk =
      right + (TURNED ? Wide<T>::place(k, column / ELEMENTS) : Narrow::place(column, k / ELEMENTS));
  return reinterpret_cast<const T*>(chunk) + (TURNED ? column : k) % ELEMENTS;
}

/// Two chunks of depth, `step` of the tile, from its rows and columns on: one mma for each pair of row and column
/// tiles.
template <class Math, bool TURNED>
DEVICE void multiply_step(Sums& sums, const unsigned char* left, const unsigned char* right, int step, int row,
                          int column) {
  using T = typename Math::Element;
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  uint32_t a[ROW_TILES][4], b[COLUMN_TILES / 2][4];
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
    ldmatrix_x4(a[i], left + Narrow::place(row + MMA_ROWS * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (uint32_t& word : a[i]) word = Math::operand(word);
  }
#pragma unroll
  for (int j = 0; j < COLUMN_TILES / 2; j++) {
    const int first = column + 2 * MMA_COLUMNS * j;
    if constexpr (!TURNED) {
      ldmatrix_x4(b[j], right + Narrow::place(first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(b[j], right + Wide<T>::place(16 * step + lane % 16, first / 8 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        b[j][i] = bits_of(load(right_element<T, TURNED>(right, first + g + i / 2 * 8, 8 * step + t + i % 2 * 4)));
    }
#pragma unroll
    for (uint32_t& word : b[j]) word = Math::operand(word);
  }
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; j++) {
      const uint32_t one[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      Math::mma(sums.d[i][j], a[i], one);
    }
  }
}

/// The same by FMA: a lane reads what its D needs from shared memory, where it would have to shuffle operands of mma.
template <bool TURNED>
DEVICE void multiply_step_fma(Sums& sums, const unsigned char* left, const unsigned char* right, int step, int row,
                              int column) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll 2
  for (int k = 8 * step; k < 8 * step + 8; k++) {
    float rows[2 * ROW_TILES], columns[2 * COLUMN_TILES];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++)
      rows[i] = load(reinterpret_cast<const float*>(left + Narrow::place(row + g + 8 * i, k / 4)) + k % 4);
#pragma unroll
    for (int j = 0; j < 2 * COLUMN_TILES; j++)
      columns[j] = load(right_element<float, TURNED>(right, column + j / 2 * MMA_COLUMNS + 2 * t + j % 2, k));
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
#pragma unroll
      for (int j = 0; j < 2 * COLUMN_TILES; j++) {
        float& sum = sums.d[i / 2][j / 2][i % 2 * 2 + j % 2];
        sum = fmaf(rows[i], columns[j], sum);
      }
    }
  }
}

/// TURNED: rows of the right operands are depth.
template <class Math, bool TURNED>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) fused_kernel(Fused<typename Math::Element> a) {
  using T = typename Math::Element;
  constexpr int DEPTH_ELEMENTS = Tile::DEPTH_BYTES / sizeof(T);
  DYN_SMEM(shared);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int row = warp % Tile::ROW_WARPS * ROW_TILES * MMA_ROWS,
            column = warp / Tile::ROW_WARPS * COLUMN_TILES * MMA_COLUMNS;
  const int64_t m0 = blockIdx.x / a.column_blocks * Tile::SIDE, n0 = blockIdx.x % a.column_blocks * Tile::SIDE;
  const int64_t updates = parts_of(a.left[0].columns, DEPTH_ELEMENTS);
  const int64_t tiles = updates + parts_of(a.left[1].columns, DEPTH_ELEMENTS);

  const auto issue = [&](int64_t tile) {
    if (tile < tiles) {
      const bool base = tile >= updates;
      unsigned char* stage = shared + tile % Tile::STAGES * STAGE_BYTES;
      const int64_t depth = (base ? tile - updates : tile) * DEPTH_ELEMENTS;
      copy_tile<Narrow>(stage, base ? a.left[1] : a.left[0], m0, depth);
      if constexpr (TURNED) {
        copy_tile<Wide<T>>(stage + SIDE_BYTES, base ? a.right[1] : a.right[0], depth, n0);
      } else {
        copy_tile<Narrow>(stage + SIDE_BYTES, base ? a.right[1] : a.right[0], n0, depth);
      }
    }
    cp_async_commit();
  };

  Sums sums = {};
  for (int i = 0; i < Tile::STAGES - 1; i++) issue(i);
  for (int64_t tile = 0; tile < tiles; tile++) {
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads();
    issue(tile + Tile::STAGES - 1);
    const unsigned char* stage = shared + tile % Tile::STAGES * STAGE_BYTES;
#pragma unroll
    for (int step = 0; step < CHUNKS / 2; step++) {
      if constexpr (Math::FMA) {
        multiply_step_fma<TURNED>(sums, stage, stage + SIDE_BYTES, step, row, column);
      } else {
        multiply_step<Math, TURNED>(sums, stage, stage + SIDE_BYTES, step, row, column);
      }
    }
    if (tile == updates - 1) {
      const Mask mask(a.mask);
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; i++) {
        float values[8];
        sums.take(i, t, values);
        Keep keep = {};
        if (mask.threshold) keep = mask.draw(uint32_t(m0 + row + g + 8 * i), uint32_t((n0 + column) / 8 + t));
#pragma unroll
        for (int k = 0; k < 8; k++) values[k] = keep(k) ? a.scale * values[k] : 0.0f;
        sums.put(i, t, values);
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    const int64_t m = m0 + row + g + 8 * i, n = n0 + column + 8 * t, valid = m < a.M ? a.N - n : 0;
    float values[8];
    sums.take(i, t, values);
    write_eight(a.out + m * a.out_stride + n, a.bias ? a.bias + n : nullptr, false, valid, a.vector, values);
  }
}

int64_t blocks(const ConstMatrix& out) { return parts_of(out.rows, Tile::SIDE) * parts_of(out.columns, Tile::SIDE); }

/// Rows of the right operands are columns of the result, or depth where TURNED.
template <bool TURNED>
Status launch_fused(const Launch& launch, DType dtype, bool tf32, const ConstMatrix (&left)[2],
                    const ConstMatrix (&right)[2], const void* bias, float scale, DeviceMask mask, const Matrix& out) {
  return with_math(dtype, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    const ConstMatrix bias_row{bias, 1, out.columns, 0};
    const Fused<T> a{{view<T>(left[0]), view<T>(left[1])},
                     {view<T>(right[0]), view<T>(right[1])},
                     static_cast<T*>(out.data),
                     out.stride,
                     out.rows,
                     out.columns,
                     static_cast<const T*>(bias),
                     scale,
                     mask,
                     parts_of(out.columns, Tile::SIDE),
                     aligned<T>(out) && aligned<T>(bias_row)};
    const dim3 grid(blocks(out));
    return LAUNCH((fused_kernel<Math, TURNED>), grid, Tile::THREADS, Tile::STAGES * STAGE_BYTES, launch, a);
  });
}

}  // namespace

Status lora_fused(const Launch& launch, DType dtype, ConstMatrix x, ConstMatrix W, const void* bias, ConstMatrix S,
                  ConstMatrix B, float scaling, Matrix y, bool tf32) {
  const int64_t M = x.rows, N = W.rows, K = x.columns, r = S.columns;
  Check check("lora_fused");
  check.matrix("x", x, M, K).matrix("W", W, N, K).matrix("S", S, M, r).matrix("B", B, N, r).matrix("y", y, M, N);
  check.that(r > 0, "the rank is 0").blocks(blocks(y));
  if (!check.status()) return check.status();
  if (M == 0 || N == 0) return {};
  return launch_fused<false>(launch, dtype, tf32, {S, x}, {B, W}, bias, scaling, {}, y);
}

Status lora_fused_grad(const Launch& launch, DType dtype, ConstMatrix dY, ConstMatrix W, ConstMatrix dS, ConstMatrix A,
                       DeviceMask mask, Matrix dX, bool tf32) {
  const int64_t M = dY.rows, N = dY.columns, K = W.columns, r = dS.columns;
  Check check("lora_fused_grad");
  check.matrix("dY", dY, M, N).matrix("W", W, N, K).matrix("dS", dS, M, r).matrix("A", A, r, K).matrix("dX", dX, M, K);
  check.that(r > 0, "the rank is 0").mask(mask, M).blocks(blocks(dX));
  if (!check.status()) return check.status();
  if (M == 0 || K == 0) return {};
  return launch_fused<true>(launch, dtype, tf32, {dS, dY}, {A, W}, nullptr, mask_scale(mask), mask, dX);
}

}  // namespace llmbuilder::gpu
