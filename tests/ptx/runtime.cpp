// A CUDA runtime for the launchers that nvcc compiled, on a machine without a driver: memory is host memory, and a
// launch calls a function of Python's, which interprets the kernel's PTX. Only what launchers use is here.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

// As CUDA's headers have them, which are not needed to link.
struct dim3 {
  unsigned x, y, z;
};
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98, cudaErrorLaunchFailure = 719;

namespace {

/// (name, grid, block, arguments, dynamic shared bytes) -> 0, or 1 when the kernel was stopped.
using Run = int (*)(const char*, const uint32_t*, const uint32_t*, void**, uint64_t);
Run run = nullptr;
std::map<const void*, std::string> names;  // of the stubs that nvcc makes for kernels

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
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
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
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
cudaError_t __cudaGetKernel(const void** kernel, const void* stub) { return *kernel = stub, cudaSuccess; }
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(stub, grid, block, arguments, shared);
}

cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(void*, int* status) { return *status = 0, cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "the interpreter stopped the kernel"; }

}  // extern "C"
