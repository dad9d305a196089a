// Elastic weight consolidation over many tensors in one launch, and a second that adds up the partial values.
//
// The tensors are cut into chunks that never straddle two; a block takes one. Which tensor holds a chunk stands in a
// table in the GPU's memory, which the host writes once for the same tensors. Traffic: theta, anchor, F and gradient
// read once, the gradient written once; and 8 bytes of partial value a chunk.
#include "cuda/check.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {
namespace {

constexpr int THREADS = 256;
constexpr int64_t CHUNK = 1 << 14;  // elements of a block: eight steps of eight elements a thread

/// In the GPU's memory: the chunks of tensor i are first_chunk[i] ... first_chunk[i + 1] - 1; then the tensors.
struct Table {
  const int64_t* first_chunk;
  const EwcTensor* tensors;
  int64_t count;

  Table(const void* memory, int64_t count)
      : first_chunk(static_cast<const int64_t*>(memory)),
        tensors(reinterpret_cast<const EwcTensor*>(first_chunk + count + 1)),
        count(count) {}

  DEVICE EwcTensor tensor(int64_t i) const {
    const EwcTensor* p = tensors + i;
    return {load(&p->theta), load(&p->anchor), load(&p->fisher), load(&p->grad), load(&p->size)};
  }
};

/// What a block works on: elements [begin, begin + size) of a tensor.
struct Chunk {
  EwcTensor tensor;
  int64_t begin, size;
};

/// The block's chunk. One thread looks it up for all; the upper levels of the search stay in the first-level cache.
DEVICE Chunk find_chunk(const Table& table) {
  SHARED(chunk, Chunk);
  if (threadIdx.x == 0) {
    const int64_t index = blockIdx.x;
    int64_t low = 0, high = table.count;  // the last tensor that begins at or before the chunk: empty ones come earlier
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (load(table.first_chunk + middle) <= index ? low : high) = middle;
    }
    chunk.tensor = table.tensor(low);
    chunk.begin = (index - load(table.first_chunk + low)) * CHUNK;
    const int64_t rest = chunk.tensor.size - chunk.begin;
    chunk.size = rest < CHUNK ? rest : CHUNK;
  }
  __syncthreads();
  return chunk;
}

/// Calls f(element, valid) for each eight elements of the chunk, of which the last may be fewer.
template <class F>
DEVICE void each_eight(const Chunk& chunk, F f) {
  for (int64_t e = 8 * threadIdx.x; e < chunk.size; e += 8 * THREADS) {
    const int64_t rest = chunk.size - e;
    f(chunk.begin + e, int(rest < 8 ? rest : 8));
  }
}

/// WEIGHTED: by F; else F is one. Products in float; values are summed in double, from the first on.
template <class T, bool WEIGHTED>
__global__ void __launch_bounds__(THREADS) penalty_kernel(Table table, float strength, double* partials) {
  SHARED(shared, double[THREADS / WARP]);
  const Chunk chunk = find_chunk(table);
  const T *theta = in_global((const T*)chunk.tensor.theta), *anchor = in_global((const T*)chunk.tensor.anchor);
  const T* fisher = in_global((const T*)chunk.tensor.fisher);
  T* grad = in_global((T*)chunk.tensor.grad);
  const bool vector = aligned(theta) && aligned(anchor) && aligned(grad) && (!WEIGHTED || aligned(fisher));
  double value = 0;
  each_eight(chunk, [&](int64_t at, int valid) {
    float drift[8], other[8], pull[8];
    load_floats(theta + at, valid, vector, drift);
    load_floats(anchor + at, valid, vector, other);
#pragma unroll
    for (int i = 0; i < 8; i++) pull[i] = drift[i] -= other[i];
    if (WEIGHTED) {
      load_floats(fisher + at, valid, vector, other);
#pragma unroll
      for (int i = 0; i < 8; i++) pull[i] *= other[i];
    }
    load_floats(grad + at, valid, vector, other);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      value += double(pull[i]) * double(drift[i]);
      other[i] = fmaf(strength, pull[i], other[i]);
    }
    store_floats(grad + at, valid, vector, other);
  });
  value = block_sum<THREADS>(value, shared);
  if (threadIdx.x == 0) store(partials + blockIdx.x, value);
}

/// value = factor * (partials[0] + ... + partials[n - 1]), by one block.
__global__ void __launch_bounds__(THREADS) sum_kernel(const double* partials, int64_t n, double factor, double* value) {
  SHARED(shared, double[THREADS / WARP]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += THREADS) sum += load(partials + i);
  sum = block_sum<THREADS>(sum, shared);
  if (threadIdx.x == 0) store(value, factor * sum);
}

template <class T>
__global__ void __launch_bounds__(THREADS) accumulate_kernel(Table table, float weight) {
  const Chunk chunk = find_chunk(table);
  T* fisher = in_global((T*)chunk.tensor.fisher);
  const T* grad = in_global((const T*)chunk.tensor.grad);
  const bool vector = aligned(fisher) && aligned(grad);
  each_eight(chunk, [&](int64_t at, int valid) {
    float f[8], g[8];
    load_floats(fisher + at, valid, vector, f);
    load_floats(grad + at, valid, vector, g);
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = fmaf(weight * g[i], g[i], f[i]);
    store_floats(fisher + at, valid, vector, f);
  });
}

Check checked(const char* launcher, const void* table, int64_t count, int64_t chunks) {
  Check check(launcher);
  check.count("count", count).count("chunks", chunks).blocks(chunks);
  return check.pointer("the table", table, chunks > 0);
}

}  // namespace

int64_t ewc_table_bytes(int64_t count) {
  return (count + 1) * int64_t(sizeof(int64_t)) + count * int64_t(sizeof(EwcTensor));
}

int64_t ewc_table(const EwcTensor* tensors, int64_t count, void* memory) {
  int64_t* first_chunk = static_cast<int64_t*>(memory);
  first_chunk[0] = 0;
  for (int64_t i = 0; i < count; i++) first_chunk[i + 1] = first_chunk[i] + (tensors[i].size + CHUNK - 1) / CHUNK;
  memcpy(first_chunk + count + 1, tensors, size_t(count) * sizeof(EwcTensor));
  return first_chunk[count];
}

int64_t ewc_penalty_workspace(int64_t chunks) { return chunks * int64_t(sizeof(double)); }

Status ewc_penalty(const Launch& launch, DType dtype, const void* table, int64_t count, int64_t chunks, bool weighted,
                   double strength, double* value, void* workspace) {
  Check check = checked("ewc_penalty", table, count, chunks);
  if (!check.pointer("value", value, true).workspace(workspace, chunks > 0).status()) return check.status();
  double* partials = static_cast<double*>(workspace);
  if (chunks > 0) {
    const Status status = with_type(dtype, [&](auto element) {
      using T = decltype(element);
      const Table tensors(table, count);
      const unsigned grid = unsigned(chunks);
      return weighted
                 ? LAUNCH((penalty_kernel<T, true>), grid, THREADS, 0, launch, tensors, float(strength), partials)
                 : LAUNCH((penalty_kernel<T, false>), grid, THREADS, 0, launch, tensors, float(strength), partials);
    });
    if (!status) return status;
  }
  return LAUNCH(sum_kernel, 1, THREADS, 0, launch, partials, chunks, strength / 2, value);
}

Status ewc_accumulate(const Launch& launch, DType dtype, const void* table, int64_t count, int64_t chunks,
                      double weight) {
  const Check check = checked("ewc_accumulate", table, count, chunks);
  if (!check.status() || chunks == 0) return check.status();
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    return LAUNCH(accumulate_kernel<T>, unsigned(chunks), THREADS, 0, launch, Table(table, count), float(weight));
  });
}

}  // namespace llmbuilder::gpu
