// CUDA's runtime, as the stand-in in recorder.cpp has it: for g++ in the place of CUDA's headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900
};
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

extern "C" {

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);  // of the thread's latest error: why, in words
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream);

#define FORBIDDEN(function) cudaError_t function(...);
#include "forbidden.inc"
#undef FORBIDDEN
}

template <class T>
cudaError_t cudaLaunchKernel(T* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

namespace recorder {

/// Calls a kernel that g++ compiled, for one thread.
using Body = void (*)(const void* kernel, void** arguments);

/// A launch with which nothing is wrong, for somebody to run. record.py has it too.
struct Launch {
  const char* name;
  const void* kernel;
  Body body;  // null where nvcc compiled the kernel
  dim3 grid, block;
  void** arguments;
  uint64_t shared, shared_limit;  // dynamic bytes; what a block may have of static and dynamic ones
};
/// Returns 0 or an error, best by `refuse`.
using Run = int (*)(const Launch*);

/// From now on `run` runs the kernels; null: nobody does. Returns who did before.
#pragma GCC visibility push(default)
extern "C" Run recorder_set_run(Run run);
#pragma GCC visibility pop

/// Makes a kernel known by a name, as nvcc's objects do when they are loaded.
void register_kernel(const void* kernel, const char* name, Body body);
/// The error, with its reason for cudaGetErrorString.
cudaError_t refuse(cudaError_t error, const std::string& why);

}  // namespace recorder
