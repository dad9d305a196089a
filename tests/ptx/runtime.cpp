// A CUDA runtime for the launchers that nvcc compiled, on a machine without a driver: memory is host memory, and a
// launch calls a function of Python's, which interprets the kernel's PTX. Only what launchers use is here.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

/// (name, grid, block, arguments, dynamic shared bytes) -> 0, or 1 when the kernel was stopped.
using Run = int (*)(const char*, const uint32_t*, const uint32_t*, void**, uint64_t);
Run run = nullptr;
std::map<const void*, std::string> names;  // of the stubs that nvcc makes for kernels

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::vector<Configuration> pushed;
cudaError_t last = cudaSuccess;

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const uint32_t of_grid[] = {grid.x, grid.y, grid.z}, of_block[] = {block.x, block.y, block.z};
  const auto name = names.find(stub);
  if (name == names.end()) return last = cudaErrorInvalidDeviceFunction;
  return last = run && run(name->second.c_str(), of_grid, of_block, arguments, shared) == 0 ? cudaSuccess
                                                                                            : cudaErrorLaunchFailure;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_set_run(Run function) { run = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = pushed.back();
  pushed.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  memcpy(stream, &c.stream, sizeof(c.stream));
  return cudaSuccess;
}

// A kernel's handle is its stub.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch((const void*)kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(stub, grid, block, arguments, shared);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 108
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 163 * 1024
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 8
                                                                  : 0;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) {
  return memset(at, value, size), cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorString(cudaError_t) { return "the interpreter stopped the kernel"; }
const char* cudaGetErrorName(cudaError_t) { return "interpreter"; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }

}  // extern "C"
