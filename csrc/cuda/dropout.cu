// Dropout: y = keep * x * scale. Every thread draws one Philox call a row and serves its eight columns, from one
// 16-byte load (two for fp32) to one 16-byte store. Traffic: x read once, y written once.
#include "cuda/check.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/mask.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

constexpr int THREADS = 256;
constexpr int GRID_Y = 4096;  // enough for the largest GPU, and each block then has a few rows for one seed

/// How a matrix is cut into calls of eight columns: x of the grid runs along the columns, y over the rows, and again
/// over the rows below where there are more. A block is one row's calls, or several rows where rows are short.
struct Cut {
  dim3 grid, block;

  Cut(int64_t rows, int64_t columns) {
    const int64_t calls = (columns + 7) / 8;
    unsigned width = 1;
    while (width < THREADS && width < calls) width *= 2;
    block = dim3(width, THREADS / width);
    const int64_t below = (rows + block.y - 1) / block.y;
    grid = dim3(unsigned((calls + width - 1) / width), unsigned(below < GRID_Y ? below : GRID_Y));
  }
};

/// Gives each of the matrix's calls to one thread: f(row, call).
template <class F>
DEVICE void each_call(int64_t rows, int64_t columns, F f) {
  const int64_t call = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (8 * call >= columns) return;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.y) * blockDim.y)
    f(row, call);
}

/// `vector`: x, y and their rows begin at multiples of 16 bytes.
template <class T>
__global__ void __launch_bounds__(THREADS)
    dropout_kernel(const T* x, T* y, int64_t rows, int64_t columns, bool vector, DeviceMask device_mask, float scale) {
  const Mask mask(device_mask);
  each_call(rows, columns, [&](int64_t row, int64_t call) {
    const int64_t at = row * columns + 8 * call, rest = columns - 8 * call;
    const int valid = int(rest < 8 ? rest : 8);
    float values[8];
    load_floats(x + at, valid, vector, values);
    const Keep keep = mask.draw(uint32_t(row), uint32_t(call));
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = keep(i) ? values[i] * scale : 0.0f;
    store_floats(y + at, valid, vector, values);
  });
}

__global__ void __launch_bounds__(THREADS)
    dropout_mask_kernel(uint8_t* keep, int64_t rows, int64_t columns, DeviceMask device_mask) {
  const Mask mask(device_mask);
  each_call(rows, columns, [&](int64_t row, int64_t call) {
    const Keep kept = mask.draw(uint32_t(row), uint32_t(call));
    for (int i = 0; i < 8 && 8 * call + i < columns; i++) store(keep + row * columns + 8 * call + i, uint8_t(kept(i)));
  });
}

Check checked(const char* launcher, const void* matrix, int64_t rows, int64_t columns, const DeviceMask& mask) {
  Check check(launcher);
  check.count("rows", rows).count("columns", columns).mask(mask, rows);
  check.that(columns <= int64_t(1) << 35, "a mask has at most 2^35 columns, got " + std::to_string(columns));
  return check.pointer("the matrix", matrix, rows > 0 && columns > 0);
}

}  // namespace

Status dropout(const Launch& launch, DType dtype, const void* x, void* y, int64_t rows, int64_t columns,
               DeviceMask mask) {
  Check check = checked("dropout", x, rows, columns, mask);
  if (!check.pointer("y", y, rows > 0 && columns > 0).status()) return check.status();
  if (rows == 0 || columns == 0) return {};
  const Cut cut(rows, columns);
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool vector = aligned(x) && aligned(y) && columns * sizeof(T) % 16 == 0;
    return LAUNCH(dropout_kernel<T>, cut.grid, cut.block, 0, launch, static_cast<const T*>(x), static_cast<T*>(y), rows,
                  columns, vector, mask, mask_scale(mask));
  });
}

Status dropout_mask(const Launch& launch, uint8_t* keep, int64_t rows, int64_t columns, DeviceMask mask) {
  if (const Check check = checked("dropout_mask", keep, rows, columns, mask); !check.status()) return check.status();
  if (rows == 0 || columns == 0) return {};
  const Cut cut(rows, columns);
  return LAUNCH(dropout_mask_kernel, cut.grid, cut.block, 0, launch, keep, rows, columns, mask);
}

}  // namespace llmbuilder::gpu
