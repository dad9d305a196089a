// A launcher that does right, and others that do one thing wrong each, for test_record.py.
#include "cuda/launch.h"

namespace llmbuilder::gpu {
namespace {

constexpr unsigned THREADS = 32, A_LOT = 60 << 10;

__global__ void dropout_kernel() {}

bool right(const Launch& launch) { return bool(LAUNCH(dropout_kernel, 2, THREADS, A_LOT, launch)); }

/// As LAUNCH, but for everything that LAUNCH looks after; whatever comes of it.
void bare(const Launch& launch, dim3 grid, dim3 block, size_t shared) {
  const DeviceGuard guard(launch.device);
  cudaLaunchKernel(dropout_kernel, grid, block, nullptr, shared, cudaStream_t(launch.stream));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void make_current(int device) { cudaSetDevice(device); }

void does_right(int device, void* stream) { right({device, stream}); }
void waits(int device, void* stream) { right({device, stream}), cudaStreamSynchronize(stream); }
void allocates(int device, void* stream) {
  void* memory;
  cudaMalloc(&memory, size_t(16));
  right({device, stream});
}
void forgets_the_stream(int device, void* stream) { right({device, static_cast<char*>(stream) - 7}); }
void leaves_the_device(int device, void* stream) { cudaSetDevice(device), right({device, stream}); }
void launches_twice(int device, void* stream) { right({device, stream}), right({device, stream}); }
void launches_no_blocks(int device, void* stream) { bare({device, stream}, dim3(3, 0), THREADS, 0); }
void launches_too_many_blocks(int device, void* stream) { bare({device, stream}, dim3(1, 65536), THREADS, 0); }
void launches_large_blocks(int device, void* stream) { bare({device, stream}, 2, 1056, 0); }
void takes_shared_memory_unasked(int device, void* stream) { bare({device, stream}, 2, THREADS, A_LOT + 1); }
void takes_the_default_stream(int device, void*) { bare({device, nullptr}, 2, THREADS, 0); }
void takes_another_device(int device, void* stream) { right({device + 1, static_cast<char*>(stream) + 256}); }
void sets_up(int device, void* stream) {
  const DeviceGuard guard(device);
  cudaFuncSetAttribute(reinterpret_cast<const void*>(dropout_kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       A_LOT);
  right({device, stream});
}
}
#pragma GCC visibility pop

}  // namespace llmbuilder::gpu
