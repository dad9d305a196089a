// How a launcher puts a kernel on a stream. Under g++ the few functions of CUDA's runtime are the emulator's.
#pragma once
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {

constexpr int64_t MAX_GRID_YZ = 65535, MAX_GRID_X = 0x7fffffff;
constexpr size_t SHARED_WITHOUT_OPT_IN = 48 << 10;

inline Status failed(const std::string& kernel, const char* step, cudaError_t error) {
  cudaGetLastError();  // the error is reported here; a later check of somebody else should not find it again
  return Status::failed(kernel + ": " + step + ": " + cudaGetErrorString(error));
}

/// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

/// Lets a kernel have more than 48 KB of shared memory on the current device. Asked once, by a call that isn't
/// captured.
inline Status opt_in(const std::string& name, const void* kernel, int shared, const Launch& launch) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, launch.device})) return {};
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (auto error = cudaStreamIsCapturing(cudaStream_t(launch.stream), &capture)) return failed(name, "stream", error);
  if (capture != cudaStreamCaptureStatusNone)
    return Status::refused(name + ": call it once before capturing, so that it is loaded and set up");
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return failed(name, "shared memory", error);
  done.insert({kernel, launch.device});
  return {};
}

/// The blocks of a grid, in 64 bits until it is known that they are not too many.
struct Blocks {
  int64_t x, y, z;

  Blocks(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  Blocks(dim3 grid) : x(grid.x), y(grid.y), z(grid.z) {}
};

template <class T>
struct Same {
  using type = T;
};

/// LAUNCH((kernel<T, true>), grid, block, shared, launch, arguments...): a kernel on launch.stream with `shared` bytes
/// of dynamic shared memory, always the same number for one kernel if above 48 KB. A grid is never empty.
#define LAUNCH(kernel, ...) \
  ::llmbuilder::gpu::launch_kernel(::llmbuilder::gpu::kernel_name(#kernel), kernel, __VA_ARGS__)

/// "kernel" of "(kernel<T, true>)".
inline std::string kernel_name(const std::string& expression) {
  const size_t begin = expression.find_first_not_of('(');
  return expression.substr(begin, expression.find_first_of("<)", begin) - begin);
}

template <class... Parameters>
Status launch_kernel(const std::string& name, void (*kernel)(Parameters...), Blocks grid, dim3 block, size_t shared,
                     const Launch& launch, typename Same<Parameters>::type... arguments) {
  if (grid.x > MAX_GRID_X || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
    return Status::refused(name + ": too large for one launch, " + std::to_string(grid.x) + " x " +
                           std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks");
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return failed(name, "device", guard.error());
#ifdef LLMBUILDER_EMULATED
  gpusim::register_kernel(kernel, name.c_str());
#endif
  if (shared > SHARED_WITHOUT_OPT_IN)
    if (Status status = opt_in(name, (const void*)kernel, int(shared), launch); !status) return status;
  void* pointers[] = {&arguments...};
  if (auto error = cudaLaunchKernel(kernel, dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), block, pointers,
                                    shared, cudaStream_t(launch.stream)))
    return failed(name, "launch", error);
  return {};
}

}  // namespace llmbuilder::gpu
