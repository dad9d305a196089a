// Base and update in one set of accumulators:
//
//     forward     y  = scaling S B^T          + x W^T + b      B [N, r] and W [N, K]: their rows are columns of y
//     backward    dX = mask/(1 - p) (dS A)    + dY W           A [r, K] and W [N, K]: their rows are depth
//
// The update comes first. When its last tile is summed, the sums are scaled, or masked and scaled, where they stand,
// and the base is summed on top: no second set of accumulators, no correction afterwards, and one pipeline of tiles.
//
//            depth in tiles of 64 bytes                          a tile in shared memory, a block's 128 x 128 of sums
//          +--------+------+------+------+--                            W
//      S,x | update | base | base | base |  ...                      +-------+
//          +--------+------+------+------+--                         |       |
//             ^ this tile: ldmatrix and mma                        x | 2 x 4 |   warps, each of 64 x 32
//                      ^ the next: landed, or about to               |       |
//                             ^ the one after: its copies begin      +-------+
//
// Three stages of shared memory go round. A step waits for its tile's copies, passes the barrier, after which nobody
// reads the stage of the tile before, begins to fill that, and multiplies.
//
// Rows of 64 bytes of depth lie in four chunks of 16. A chunk's place is XORed with its row, so that the eight rows
// that ldmatrix reads at once lie in different banks. Backward, the right operand's tile has depth as its rows, and is
// turned by ldmatrix.trans (16-bit types) or read word by word (fp32).
//
// D gives a lane pairs of columns of four mma. Transposed within each quad of lanes they are Eights: one Philox call
// masks them, and 16 bytes hold them. After masking they go back the same way.
//
// Traffic, in bytes, with e of an element and ceilings of the quotients:
//     N / 128 * e M (K + r)   x and S      M / 128 * e N (K + r)   W and B      mostly from the second-level cache
//     e M N                   y
// and likewise backward. A GPU's library has better products than this one (wgmma, tcgen05): it serves where measured.
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

/// The tile at (row, column) of a matrix, with zeros outside.
template <class Layout, class T>
DEVICE void copy_tile(unsigned char* tile, const View<T>& from, int64_t row, int64_t column) {
  constexpr int ELEMENTS = CHUNK / sizeof(T);
#pragma unroll
  for (int i = 0; i < SIDE_BYTES / CHUNK / Tile::THREADS; i++) {
    const int chunk = i * Tile::THREADS + threadIdx.x, r = chunk / Layout::ROW_CHUNKS, c = chunk % Layout::ROW_CHUNKS;
    const int64_t valid = row + r < from.rows ? from.columns - column - c * ELEMENTS : 0;
    const T* source = from.at + (row + r) * from.stride + column + c * ELEMENTS;
    T* target = reinterpret_cast<T*>(tile + Layout::place(r, c));
    if (from.vector) {
      cp_async16(target, source, valid > 0);
    } else {
#pragma unroll
      for (int e = 0; e < ELEMENTS; e++) store(target + e, e < valid ? load(source + e) : from_bits<T>(0));
    }
  }
}

template <class T>
struct Product {
  View<T> left, right;
};

template <class T>
struct Fused {
  Product<T> update, base;
  T* out;
  int64_t out_stride, M, N;  // of out
  bool out_vector;
  const T* bias;    // or null
  float scale;      // of the update
  DeviceMask mask;  // of the update; threshold 0 for none
  int64_t column_blocks;
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

  template <class F>
  DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
      for (int j = 0; j < COLUMN_TILES; j++) {
#pragma unroll
        for (int h = 0; h < 4; h++) f(d[i][j][h], i, j, h);
      }
    }
  }

  DEVICE void scale(float factor) {
    each([&](float& sum, int, int, int) { sum *= factor; });
  }

  /// Zero where the mask drops, the rest times `factor`; for the lane whose first Eight is `call` of `row`.
  DEVICE void drop(const Mask& mask, float factor, int64_t row, int64_t call, int t) {
    if (mask.threshold == 0) return scale(factor);
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
      float values[8];
      take(i, t, values);
      const Keep keep = mask.draw(uint32_t(row + 8 * i), uint32_t(call));
#pragma unroll
      for (int k = 0; k < 8; k++) values[k] = keep(k) ? factor * values[k] : 0.0f;
      put(i, t, values);
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

/// A whole tile by FMA: a lane reads what its D needs from shared memory, where it would have to shuffle operands of
/// mma. The tile is summed by itself first: in fp32 one long chain of additions would lose digits.
template <bool TURNED>
DEVICE void add_tile_fma(Sums& sums, const unsigned char* left, const unsigned char* right, int row, int column) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  Sums tile = {};
#pragma unroll 2
  for (int k = 0; k < Tile::DEPTH_BYTES / 4; k++) {
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
        float& sum = tile.d[i / 2][j / 2][i % 2 * 2 + j % 2];
        sum = fmaf(rows[i], columns[j], sum);
      }
    }
  }
  sums.each([&](float& sum, int i, int j, int h) { sum += tile.d[i][j][h]; });
}

/// TURNED: rows of the right operands are depth. ALIGNED: all matrices are; else each says so for itself.
template <class Math, bool TURNED, bool ALIGNED>
__global__ void __launch_bounds__(Tile::THREADS, sizeof(typename Math::Element) == 2 ? Tile::BLOCKS : 1)
    fused_kernel(Fused<typename Math::Element> a) {
  using T = typename Math::Element;
  constexpr int DEPTH_ELEMENTS = Tile::DEPTH_BYTES / sizeof(T);
  DYN_SMEM(shared);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  const int row = warp % Tile::ROW_WARPS * ROW_TILES * MMA_ROWS;
  const int column = warp / Tile::ROW_WARPS * COLUMN_TILES * MMA_COLUMNS;
  const int64_t m0 = blockIdx.x / a.column_blocks * Tile::SIDE, n0 = blockIdx.x % a.column_blocks * Tile::SIDE;
  const int64_t updates = parts_of(a.update.left.columns, DEPTH_ELEMENTS);
  const int64_t tiles = updates + parts_of(a.base.left.columns, DEPTH_ELEMENTS);

  const auto copy = [&](unsigned char* stage, Product<T> product, int64_t depth) {
    if (ALIGNED) product.left.vector = product.right.vector = true;
    copy_tile<Narrow>(stage, product.left, m0, depth);
    if constexpr (TURNED) {
      copy_tile<Wide<T>>(stage + SIDE_BYTES, product.right, depth, n0);
    } else {
      copy_tile<Narrow>(stage + SIDE_BYTES, product.right, n0, depth);
    }
  };
  const auto issue = [&](int64_t tile) {
    unsigned char* stage = shared + tile % Tile::STAGES * STAGE_BYTES;
    if (tile < updates) {
      copy(stage, a.update, tile * DEPTH_ELEMENTS);
    } else if (tile < tiles) {
      copy(stage, a.base, (tile - updates) * DEPTH_ELEMENTS);
    }
    cp_async_commit();
  };

  Sums sums = {};
  const auto add_tile = [&](int64_t tile) {
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads();
    issue(tile + Tile::STAGES - 1);
    const unsigned char* stage = shared + tile % Tile::STAGES * STAGE_BYTES;
    if constexpr (Math::FMA) {
      add_tile_fma<TURNED>(sums, stage, stage + SIDE_BYTES, row, column);
    } else {
#pragma unroll
      for (int step = 0; step < CHUNKS / 2; step++)
        multiply_step<Math, TURNED>(sums, stage, stage + SIDE_BYTES, step, row, column);
    }
  };
#pragma unroll
  for (int tile = 0; tile < Tile::STAGES - 1; tile++) issue(tile);
  for (int64_t tile = 0; tile < updates; tile++) add_tile(tile);
  if constexpr (TURNED) {
    sums.drop(Mask(a.mask), a.scale, m0 + row + g, (n0 + column) / 8 + t, t);
  } else {
    sums.scale(a.scale);
  }
  for (int64_t tile = updates; tile < tiles; tile++) add_tile(tile);
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    const int64_t m = m0 + row + g + 8 * i, n = n0 + column + 8 * t, valid = m < a.M ? a.N - n : 0;
    float values[8];
    sums.take(i, t, values);
    write_eight(a.out + m * a.out_stride + n, a.bias ? a.bias + n : nullptr, false, valid, ALIGNED || a.out_vector,
                values);
  }
}

int64_t blocks(const ConstMatrix& out) { return parts_of(out.rows, Tile::SIDE) * parts_of(out.columns, Tile::SIDE); }

/// Left and right operands of the update and of the base.
struct Operands {
  ConstMatrix left, right;
};

template <bool TURNED>
Status launch_fused(const Launch& launch, DType dtype, bool tf32, const Operands& update, const Operands& base,
                    const void* bias, float scale, DeviceMask mask, const Matrix& out) {
  return with_math(dtype, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Element;
    Fused<T> a{};
    a.update = {view<T>(update.left), view<T>(update.right)};
    a.base = {view<T>(base.left), view<T>(base.right)};
    a.out = static_cast<T*>(out.data);
    a.out_stride = out.stride, a.M = out.rows, a.N = out.columns;
    a.out_vector = aligned<T>(out) && aligned<T>({bias, 1, out.columns, 0});
    a.bias = static_cast<const T*>(bias);
    a.scale = scale;
    a.mask = mask;
    a.column_blocks = parts_of(out.columns, Tile::SIDE);
    const bool all_aligned =
        a.update.left.vector && a.update.right.vector && a.base.left.vector && a.base.right.vector && a.out_vector;
    constexpr int SHARED = Tile::STAGES * STAGE_BYTES;
    if (all_aligned) return LAUNCH((fused_kernel<Math, TURNED, true>), blocks(out), Tile::THREADS, SHARED, launch, a);
    return LAUNCH((fused_kernel<Math, TURNED, false>), blocks(out), Tile::THREADS, SHARED, launch, a);
  });
}

}  // namespace

Status lora_fused(const Launch& launch, DType dtype, ConstMatrix x, ConstMatrix W, const void* bias, ConstMatrix S,
                  ConstMatrix B, float scaling, Matrix y, bool tf32) {
  const int64_t M = x.rows, N = W.rows, K = x.columns, r = S.columns;
  Check check("lora_fused");
  check.matrix("x", x, M, K).matrix("W", W, N, K).matrix("S", S, M, r).matrix("B", B, N, r).matrix("y", y, M, N);
  check.blocks(blocks(y));
  if (!check.status()) return check.status();
  if (M == 0 || N == 0) return {};
  return launch_fused<false>(launch, dtype, tf32, {S, B}, {x, W}, bias, scaling, {}, y);
}

Status lora_fused_grad(const Launch& launch, DType dtype, ConstMatrix dY, ConstMatrix W, ConstMatrix dS, ConstMatrix A,
                       DeviceMask mask, Matrix dX, bool tf32) {
  const int64_t M = dY.rows, N = dY.columns, K = W.columns, r = dS.columns;
  Check check("lora_fused_grad");
  check.matrix("dY", dY, M, N).matrix("W", W, N, K).matrix("dS", dS, M, r).matrix("A", A, r, K).matrix("dX", dX, M, K);
  check.mask(mask, M).blocks(blocks(dX));
  if (!check.status()) return check.status();
  if (M == 0 || K == 0) return {};
  return launch_fused<true>(launch, dtype, tf32, {dS, A}, {dY, W}, nullptr, mask_scale(mask), mask, dX);
}

}  // namespace llmbuilder::gpu
