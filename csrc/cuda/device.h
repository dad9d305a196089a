// What a kernel may use of a GPU: the one header that stands between a .cu and its compiler. nvcc gets CUDA C++ and
// PTX; g++ with LLMBUILDER_EMULATED gets the same names from an emulator (tests/gpusim/gpusim.h), which runs a kernel
// on the CPU and checks it. Either way a kernel has
//
//     __global__, __launch_bounds__, threadIdx, blockIdx, blockDim, gridDim, dim3, uint3, __syncthreads(),
//     __syncwarp(mask), __shfl_sync, __shfl_xor_sync, __shfl_down_sync (mask, value of 4 or 8 bytes, lane or distance)
//
// and what is below; nothing else of CUDA's. A .cu never reads or writes global memory but by load, store, load_16,
// store_16 and cp_async16, because there the emulator checks bounds and alignment and counts the traffic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "llmbuilder/dtype.h"

#if defined(__CUDACC__)
#define DEVICE __device__ __forceinline__
#define HD __host__ __device__ __forceinline__

// SHARED(sums, float[8]): static shared memory of a block. One site is one array, also when it is passed twice.
#define SHARED(name, ...)                 \
  using name##_shared_type = __VA_ARGS__; \
  __shared__ name##_shared_type name

// DYN_SMEM(tiles): unsigned char* tiles, the dynamic shared memory that the launch asked for; 128-byte aligned.
#define DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#elif defined(LLMBUILDER_EMULATED)
#include "gpusim.h"
#else
#error "a .cu is compiled by nvcc, or by g++ with LLMBUILDER_EMULATED"
#endif

namespace llmbuilder::gpu {

constexpr int WARP = 32;  // threads of a warp

// --------------------------------------------------------------------------------------------------- bits and elements

HD uint32_t as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
HD float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

HD uint32_t bits_of(float value) { return as_uint(value); }
HD uint32_t bits_of(bf16 value) { return value.bits; }
HD uint32_t bits_of(f16 value) { return value.bits; }

/// The element whose bits are the low ones of `bits`.
template <class T>
HD T from_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return as_float(bits);
  } else {
    return T{uint16_t(bits)};
  }
}

#if defined(__CUDACC__)

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return as_float(uint32_t(value.bits) << 16); }
DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

/// Rounded to nearest, ties to even.
template <class T>
DEVICE T from_float(float value) {
  T result;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  } else if constexpr (std::is_same_v<T, f16>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  } else {
    result = value;
  }
  return result;
}

/// Two elements of 16 bits in a word, rounded as by from_float.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2, "two elements make a word");
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

/// A float's bits with its mantissa rounded to ten bits, ties away from zero: what mma_m16n8k8_tf32 takes.
DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(as_float(bits)));
  return result;
}

// -------------------------------------------------------------------------------------------------------------- memory

/// *p and *p = value for a type of 1, 2, 4, 8 or 16 bytes, aligned to its size. Global or shared memory.
template <class T>
DEVICE T load(const T* p) {
  return *p;
}
template <class T>
DEVICE void store(T* p, T value) {
  *p = value;
}

/// p, which points to global memory: of a pointer out of memory nvcc doesn't know, and would ask at every access.
template <class T>
DEVICE T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

/// Four words from or to a multiple of 16 bytes, in one access. Global or shared memory.
DEVICE void load_16(const void* p, uint32_t* words) {
  const uint4 value = *static_cast<const uint4*>(p);
  words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
}
/// In PTX, since nvcc splits stores of a uint4 in four; which of the two it is it knows when it compiles.
DEVICE void store_16(void* p, const uint32_t* words) {
  if (__isShared(p)) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

/// Begins to copy 16 bytes from global to shared memory, both multiples of 16, or zeros where `valid` is false
/// (`global` is then not read). They are there once the thread has waited for the group that the copy was committed in,
/// and for other threads after a barrier on top.
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
/// Closes the group of the copies begun since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most N of the latest groups are still under way.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ------------------------------------------------------------------------------------------------- matrices of a warp

/// Four 8x8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8, a
/// multiple of 16 bytes. words[j] of lane i: row i / 4, columns 2 (i % 4) and the next of matrix j; `trans`: of its
/// transpose.
DEVICE void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, k] b[k, 8] in fp32, by a warp. Lane (g, t) = (lane / 4, lane % 4) has, for 16-bit types (k = 16),
//     a[0], a[1], a[2], a[3]: columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of the two
//     b[0], b[1]: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g        d: columns 2t, 2t + 1 of rows g and g + 8
// and for tf32 (k = 8) columns t of rows g and g + 8, then t + 4 of the two; rows t and t + 4 of column g; d as above.
#define LLMBUILDER_MMA(name, instruction)                                                       \
  DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {             \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
LLMBUILDER_MMA(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
LLMBUILDER_MMA(mma_m16n8k16_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
LLMBUILDER_MMA(mma_m16n8k8_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef LLMBUILDER_MMA

#else

using gpusim::device::cp_async16;
using gpusim::device::cp_async_commit;
using gpusim::device::cp_async_wait;
using gpusim::device::from_float;
using gpusim::device::in_global;
using gpusim::device::ldmatrix_x4;
using gpusim::device::ldmatrix_x4_trans;
using gpusim::device::load;
using gpusim::device::load_16;
using gpusim::device::mma_m16n8k16_bf16;
using gpusim::device::mma_m16n8k16_f16;
using gpusim::device::mma_m16n8k8_tf32;
using gpusim::device::pack;
using gpusim::device::round_to_tf32;
using gpusim::device::store;
using gpusim::device::store_16;
using gpusim::device::to_float;

#endif

}  // namespace llmbuilder::gpu
