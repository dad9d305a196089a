// Tiny kernels, each right and with a bug, for test_gpusim.py: the emulator must see the bug and pass the right one.
#include "cuda/launch.h"

namespace llmbuilder::gpu {
namespace {

constexpr int THREADS = 128;

/// out[i] = in[(i + 32) % 128], by way of shared memory.
template <bool BUG>
__global__ void missing_barrier(const float* in, float* out) {
  SHARED(values, float[THREADS]);
  values[threadIdx.x] = load(in + threadIdx.x);
  if (!BUG) __syncthreads();
  store(out + threadIdx.x, values[(threadIdx.x + 32) % THREADS]);
}

/// The same, twice through one array; without the second barrier a fast thread overwrites what a slow one has yet to
/// read.
template <bool BUG>
__global__ void early_refill(const float* in, float* out) {
  SHARED(values, float[THREADS]);
  values[threadIdx.x] = load(in + threadIdx.x);
  __syncthreads();
  const float value = values[(threadIdx.x + 32) % THREADS];
  if (!BUG) __syncthreads();
  values[threadIdx.x] = 0;
  store(out + threadIdx.x, value);
}

/// out[i] = in[i], 16 bytes a thread in two groups of copies.
template <bool BUG>
__global__ void lax_wait(const float* in, float* out) {
  DYN_SMEM(memory);
  float* values = reinterpret_cast<float*>(memory);
  const int i = 4 * threadIdx.x;
  for (int half = 0; half < 2; half++) {
    if (int(threadIdx.x) / 16 == half) cp_async16(values + i, in + i, true);
    cp_async_commit();
  }
  cp_async_wait<BUG ? 1 : 0>();
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t words[4];
    load_16(values + i, words);
    store_16(out + i, words);
  }
  cp_async_wait<0>();
}

template <bool BUG>
__global__ void copy_in_flight(const float* in, float* out) {
  DYN_SMEM(memory);
  if (threadIdx.x < 32) cp_async16(memory + 16 * threadIdx.x, in + 4 * threadIdx.x, true);
  cp_async_commit();
  if (!BUG) cp_async_wait<0>();
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void divergent_barrier(const float* in, float* out) {
  if (BUG && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void exit_before_barrier(const float* in, float* out) {
  store(out + threadIdx.x, load(in + threadIdx.x));
  if (BUG && threadIdx.x == 5) return;
  __syncthreads();
}

template <bool BUG>
__global__ void deadlock(const float* in, float* out) {
  store(out + threadIdx.x, load(in + threadIdx.x));
  if (threadIdx.x < (BUG ? 31 : 32)) __syncwarp();
  __syncthreads();
}

template <bool BUG>
__global__ void read_out_of_bounds(const float* in, float* out) {
  store(out + threadIdx.x, load(in + threadIdx.x + (BUG && threadIdx.x == 127)));
}

template <bool BUG>
__global__ void write_out_of_bounds(const float* in, float* out) {
  const float value = load(in + threadIdx.x);
  store(out + threadIdx.x, value);
  if (BUG && threadIdx.x == 0) store(out - 1, value);
}

template <bool BUG>
__global__ void misaligned(const float* in, float* out) {
  uint32_t words[4];
  if (threadIdx.x < 32) {
    load_16(in + 4 * threadIdx.x - (BUG && threadIdx.x == 3), words);
    store_16(out + 4 * threadIdx.x, words);
  }
}

template <bool BUG>
__global__ void misaligned_ldmatrix(const float* in, float* out) {
  DYN_SMEM(memory);
  uint32_t words[4];
  ldmatrix_x4(words, memory + 16 * (threadIdx.x % 32) + (BUG ? 2 : 0));
  store(out + threadIdx.x, load(in + threadIdx.x));
}

/// out[i] = in[i], where the first half of each warp asks its first lane.
template <bool BUG>
__global__ void lost_lane(const float* in, float* out) {
  int i = threadIdx.x;
  if (i % 32 < 16) i = __shfl_sync(0xffffu, i, BUG ? 16 : 0) + i % 32;
  store(out + i, load(in + i));
}

template <bool BUG>
__global__ void different_masks(const float* in, float* out) {
  __shfl_sync(BUG && threadIdx.x == 7 ? 0xffu : ~0u, int(threadIdx.x), 0);
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void mask_without_itself(const float* in, float* out) {
  if (BUG || threadIdx.x < 64) __syncwarp(BUG ? 1 : ~0u);
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void race_of_blocks(const float* in, float* out) {
  const float value = load(in + threadIdx.x);
  if (BUG || blockIdx.x == 0) store(out + threadIdx.x, value);
}

/// The update of a sum that only an atomic could make.
template <bool BUG>
__global__ void sum_of_blocks(const float* in, float* out) {
  if (blockIdx.x == 0) store(out + threadIdx.x, load(in + threadIdx.x));
  if (BUG && blockIdx.x == 1) load(out + threadIdx.x);
}

template <bool BUG>
__global__ void race_of_warps(const float* in, float* out) {
  store(out + threadIdx.x, load(in + threadIdx.x));
  if (!BUG) __syncthreads();
  load(out + (threadIdx.x + 32) % THREADS);
}

template <bool BUG>
__global__ void shared_write_out_of_bounds(const float* in, float* out) {
  SHARED(values, float[THREADS]);
  float* all = values;
  all[threadIdx.x + BUG] = load(in + threadIdx.x);
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void shared_access_out_of_bounds(const float* in, float* out) {
  DYN_SMEM(memory);
  uint32_t words[4];
  load_16(memory + 16 * threadIdx.x + (BUG && threadIdx.x == 127 ? 16 : 0), words);
  store(out + threadIdx.x, load(in + threadIdx.x));
}

template <bool BUG>
__global__ void unset_shared(const float* in, float* out) {
  SHARED(values, float[THREADS]);
  if (!BUG || threadIdx.x != 9) values[threadIdx.x] = load(in + threadIdx.x);
  __syncthreads();
  store(out + threadIdx.x, values[threadIdx.x]);
}

template <bool BUG>
__global__ void unrounded_tf32(const float* in, float* out) {
  float d[4] = {};
  const uint32_t word = as_uint(load(in + threadIdx.x));
  const uint32_t rounded = BUG ? word : round_to_tf32(word), a[4] = {rounded}, b[2] = {};
  mma_m16n8k8_tf32(d, a, b);
  store(out + threadIdx.x, as_float(word));
}

/// Seen by AddressSanitizer alone.
template <bool BUG>
__global__ void shared_read_out_of_bounds(const float* in, float* out) {
  SHARED(values, float[THREADS]);
  float* all = values;
  all[threadIdx.x] = load(in + threadIdx.x);
  const float value = all[threadIdx.x], beyond = all[threadIdx.x + (BUG && threadIdx.x == THREADS - 1)];
  store(out + threadIdx.x, beyond == 0 ? 0 : value);
}

/// 30 KB of static shared memory; with the dynamic one it is more than 48 KB.
template <bool BUG>
__global__ void static_and_dynamic(const float* in, float* out) {
  SHARED(values, float[30 * 256]);
  values[threadIdx.x] = load(in + threadIdx.x);
  store(out + threadIdx.x, values[threadIdx.x]);
}

__global__ void copy(const float* in, float* out) { store(out + threadIdx.x, load(in + threadIdx.x)); }

struct Probe {
  const char* name;
  void (*right)(const float*, float*);
  void (*bug)(const float*, float*);
  int blocks;
  size_t shared;
};
#define PROBE(name, blocks, shared) {#name, name<false>, name<true>, blocks, shared}
const Probe PROBES[] = {PROBE(missing_barrier, 1, 0),
                        PROBE(early_refill, 1, 0),
                        PROBE(lax_wait, 1, 512),
                        PROBE(copy_in_flight, 1, 512),
                        PROBE(divergent_barrier, 1, 0),
                        PROBE(exit_before_barrier, 1, 0),
                        PROBE(deadlock, 1, 0),
                        PROBE(read_out_of_bounds, 1, 0),
                        PROBE(write_out_of_bounds, 1, 0),
                        PROBE(misaligned, 1, 0),
                        PROBE(misaligned_ldmatrix, 1, 1024),
                        PROBE(lost_lane, 1, 0),
                        PROBE(different_masks, 1, 0),
                        PROBE(mask_without_itself, 1, 0),
                        PROBE(race_of_blocks, 3, 0),
                        PROBE(sum_of_blocks, 3, 0),
                        PROBE(race_of_warps, 1, 0),
                        PROBE(shared_write_out_of_bounds, 1, 0),
                        PROBE(shared_access_out_of_bounds, 1, 2048),
                        PROBE(unset_shared, 1, 0),
                        PROBE(unrounded_tf32, 1, 0),
                        PROBE(shared_read_out_of_bounds, 1, 0)};

// ------------------------------------------------------------------------------------------------ what operations do

/// d[16, 8] = a[16, k] b[8, k]^T by one warp, of bits of 16-bit (k = 16) or fp32 (k = 8) elements.
template <class T>
__global__ void product(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  constexpr int PACKED = 4 / sizeof(T), WORDS = 8;  // of a row
  const auto word = [&](const T* p, int row, int i) {
    return load(reinterpret_cast<const uint32_t*>(p) + row * WORDS + i);
  };
  uint32_t fa[4] = {word(a, g, t), word(a, g + 8, t), word(a, g, t + 4), word(a, g + 8, t + 4)};
  uint32_t fb[2] = {word(b, g, t), word(b, g, t + 4)};
  float fd[4] = {};
  if constexpr (PACKED == 1) {
    for (uint32_t& w : fa) w = round_to_tf32(w);
    for (uint32_t& w : fb) w = round_to_tf32(w);
    mma_m16n8k8_tf32(fd, fa, fb);
  } else if constexpr (std::is_same_v<T, bf16>) {
    mma_m16n8k16_bf16(fd, fa, fb);
  } else {
    mma_m16n8k16_f16(fd, fa, fb);
  }
  for (int i = 0; i < 4; i++) store(d + (g + 8 * (i / 2)) * 8 + 2 * t + i % 2, fd[i]);
}

/// Four 8x8 matrices of 16 bits, one after the other in `in`, at row stride `stride` bytes in shared memory;
/// words[lane][j] to `out`.
__global__ void matrices(const uint16_t* in, uint32_t* out, int stride, bool trans) {
  DYN_SMEM(memory);
  unsigned char* row = memory + threadIdx.x * stride;
  uint32_t words[4];
  load_16(in + 8 * threadIdx.x, words);
  store_16(row, words);
  __syncwarp();
  trans ? ldmatrix_x4_trans(words, row) : ldmatrix_x4(words, row);
  store_16(out + 4 * threadIdx.x, words);
}

__global__ void shuffles(const double* in, double* out) {
  const double value = load(in + threadIdx.x);
  store(out + threadIdx.x, __shfl_sync(~0u, value, 5));
  store(out + 32 + threadIdx.x, __shfl_xor_sync(~0u, value, 3));
  store(out + 64 + threadIdx.x, __shfl_down_sync(~0u, value, 4));
}

template <class T>
__global__ void convert(const float* in, T* out, int64_t n) {
  for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
    store(out + i, from_float<T>(load(in + i)));
}
template <class T>
__global__ void convert_back(const T* in, float* out, int64_t n) {
  for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
    store(out + i, to_float(load(in + i)));
}
__global__ void to_tf32(const float* in, float* out, int64_t n) {
  for (int64_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
    store(out + i, as_float(round_to_tf32(as_uint(load(in + i)))));
}

/// In which order the blocks came: each takes the next number from shared memory of the host.
int next_number;
__global__ void number_blocks(int32_t* out) {
  if (threadIdx.x == 0) store(out + blockIdx.x, next_number++);
}
/// And in which order the warps of a block did.
__global__ void number_warps(int32_t* out) {
  if (threadIdx.x % 32 == 0) store(out + threadIdx.x / 32, next_number++);
}

const char* say(const Status& status) {
  static std::string message;
  message = status.message;
  return message.c_str();
}

const Launch HERE{0, nullptr};

}  // namespace
}  // namespace llmbuilder::gpu

using namespace llmbuilder;
using namespace llmbuilder::gpu;

#pragma GCC visibility push(default)
extern "C" {

const char* probe_name(int i) { return i < int(sizeof(PROBES) / sizeof(*PROBES)) ? PROBES[i].name : nullptr; }
const char* probe(int i, bool bug, const float* in, float* out) {
  const Probe& p = PROBES[i];
  return say(LAUNCH(bug ? p.bug : p.right, p.blocks, THREADS, p.shared, HERE, in, out));
}

const char* launch_copy(const float* in, float* out, uint32_t x, uint32_t y, uint32_t z, uint32_t block,
                        uint64_t shared) {
  return say(LAUNCH(copy, dim3(x, y, z), block, shared, HERE, in, out));
}
const char* launch_static(const float* in, float* out, uint64_t shared) {
  return say(LAUNCH(static_and_dynamic<false>, 1, THREADS, shared, HERE, in, out));
}

const char* launch_product(int dtype, const void* a, const void* b, float* d) {
  if (DType(dtype) == DType::bf16) return say(LAUNCH(product<bf16>, 1, 32, 0, HERE, (const bf16*)a, (const bf16*)b, d));
  if (DType(dtype) == DType::f16) return say(LAUNCH(product<f16>, 1, 32, 0, HERE, (const f16*)a, (const f16*)b, d));
  return say(LAUNCH(product<float>, 1, 32, 0, HERE, (const float*)a, (const float*)b, d));
}
const char* launch_matrices(const uint16_t* in, uint32_t* out, int stride, bool trans) {
  return say(LAUNCH(matrices, 1, 32, 32 * stride, HERE, in, out, stride, trans));
}
const char* launch_shuffles(const double* in, double* out) { return say(LAUNCH(shuffles, 1, 32, 0, HERE, in, out)); }

const char* launch_convert(int dtype, const float* in, void* out, int64_t n) {
  if (DType(dtype) == DType::bf16) return say(LAUNCH(convert<bf16>, 4, THREADS, 0, HERE, in, (bf16*)out, n));
  if (DType(dtype) == DType::f16) return say(LAUNCH(convert<f16>, 4, THREADS, 0, HERE, in, (f16*)out, n));
  return say(LAUNCH(to_tf32, 4, THREADS, 0, HERE, in, (float*)out, n));
}
const char* launch_convert_back(int dtype, const void* in, float* out, int64_t n) {
  if (DType(dtype) == DType::bf16) return say(LAUNCH(convert_back<bf16>, 4, THREADS, 0, HERE, (const bf16*)in, out, n));
  return say(LAUNCH(convert_back<f16>, 4, THREADS, 0, HERE, (const f16*)in, out, n));
}

const char* launch_number_blocks(int32_t* out) {
  next_number = 0;
  return say(LAUNCH(number_blocks, 16, 32, 0, HERE, out));
}
const char* launch_number_warps(int32_t* out) {
  next_number = 0;
  return say(LAUNCH(number_warps, 1, 512, 0, HERE, out));
}
}
#pragma GCC visibility pop
