// What the host may tell the emulator and ask it, as plain C for ctypes (harness.py). Not for kernels and launchers.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)  // of a library that hides the rest
extern "C" {

/// Threads and blocks run in another order for each seed; 0: in their own.
void gpusim_seed(uint64_t seed);

/// From now on kernels may touch global memory in registered buffers alone: `rows` of `row_bytes`, `stride` bytes
/// apart.
void gpusim_register(const char* name, uint64_t address, uint64_t rows, uint64_t row_bytes, uint64_t stride);
/// No buffer is registered any more, and global memory is not checked.
void gpusim_forget();

/// Forgets what was recorded, and from now on records launches, or not.
void gpusim_record(int recording);
uint64_t gpusim_launches();
const char* gpusim_kernel(uint64_t launch);
/// grid x y z, block x y z, dynamic and static shared bytes, mma, shuffles, barriers, ldmatrix, ldmatrix_conflicts,
/// copies
void gpusim_counts(uint64_t launch, uint64_t counts[14]);
/// Traffic in each of the buffers registered at the time: bytes read and written as requested, and different ones.
uint64_t gpusim_buffers(uint64_t launch);
const char* gpusim_buffer(uint64_t launch, uint64_t buffer);
void gpusim_traffic(uint64_t launch, uint64_t buffer, uint64_t counts[4]);
}
#pragma GCC visibility pop
