// A recording stand-in for the CUDA runtime, linked in the place of cudart with launchers that nvcc or g++ compiled. It
// notes each call, refuses what a GPU would refuse, and hands the launches that are left to whoever runs the kernels:
// the emulator, the PTX interpreter, or nobody.
//
// There are four devices, and stream s belongs to device s / 256. As in CUDA, the current device and the last error are
// a thread's own. nvcc's objects must stand behind this file when they are linked, since they call it as they are
// loaded.
#include "recorder.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace recorder {
namespace {

constexpr int DEVICES = 4, STREAMS = 256;
constexpr uint64_t WITHOUT_OPT_IN = 48 << 10, NO_STREAM = UINT64_MAX;

struct Kernel {
  std::string name;
  Body body;
};

std::mutex mutex;                     // of all that follows, up to the thread's own
uint64_t limit_of_shared = 99 << 10;  // that of sm_86, sm_89 and sm_120
std::vector<std::string> events;
std::map<const void*, Kernel> kernels;
std::map<std::pair<const void*, int>, int> opted_in;  // dynamic shared memory that a kernel may have on a device
std::map<std::string, int> failures;                  // what functions are told to return
uint64_t captured_stream = NO_STREAM;
Run run;

thread_local int device;
thread_local cudaError_t last_error;
thread_local std::string reason, message, joined;

using Lock = std::lock_guard<std::mutex>;

std::string text(uint64_t number) { return std::to_string(number); }
std::string text(dim3 d, const char* between) { return text(d.x) + between + text(d.y) + between + text(d.z); }

Kernel known(const void* kernel) {
  const auto found = kernels.find(kernel);
  return found == kernels.end() ? Kernel{"unknown", nullptr} : found->second;
}

/// Notes a call of `function` as words, the last of which is what it returns: `error`, or what it was told to.
template <class... Words>
cudaError_t note(const char* function, cudaError_t error, const Words&... words) {
  if (const auto told = failures.find(function); told != failures.end())
    error = refuse(cudaError_t(told->second), std::string(function) + " was told to fail");
  std::string line;
  ((line += std::string(words) + "\t"), ...);
  events.push_back(line + text(error));
  if (error) last_error = error;
  return error;
}

cudaError_t forbidden(const char* function) {
  const Lock lock(mutex);
  return note(function, refuse(cudaErrorStreamCaptureUnsupported, "no launcher may call it"), "forbidden", function);
}

cudaError_t check_configuration(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, "no block can have " + text(block, " x ") + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "no grid can have " + text(grid, " x ") + " blocks");
  return cudaSuccess;
}

cudaError_t check_launch(const Launch& launch, uint64_t stream) {
  if (!kernels.count(launch.kernel)) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel");
  if (const cudaError_t error = check_configuration(launch.grid, launch.block)) return error;
  const auto allowed = opted_in.find({launch.kernel, device});
  if (launch.shared > (allowed == opted_in.end() ? WITHOUT_OPT_IN : uint64_t(allowed->second)))
    return refuse(cudaErrorInvalidValue,
                  text(launch.shared) + " bytes of dynamic shared memory, more than opted in to");
  if (stream / STREAMS != uint64_t(device))
    return refuse(cudaErrorInvalidResourceHandle, "stream " + text(stream) + " is not one of device " + text(device));
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  const Lock lock(mutex);
  const auto [name, body] = known(kernel);
  const auto number = reinterpret_cast<uint64_t>(stream);
  const uint64_t limit = opted_in.count({kernel, device}) ? limit_of_shared : WITHOUT_OPT_IN;
  const Launch one{name.c_str(), kernel, body, grid, block, arguments, shared, limit};
  cudaError_t error = check_launch(one, number);
  if (!error && run && !failures.count("cudaLaunchKernel")) error = cudaError_t(run(&one));
  return note("cudaLaunchKernel", error, "launch", name, text(device), text(number), text(grid, ","), text(block, ","),
              text(shared));
}

}  // namespace

void register_kernel(const void* kernel, const char* name, Body body) {
  const Lock lock(mutex);
  kernels[kernel] = {name, body};
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  reason = why;
  return error;
}

}  // namespace recorder

using namespace recorder;

// ----------------------------------------------------------------------------------------------- what Python may ask

#pragma GCC visibility push(default)
extern "C" {

Run recorder_set_run(Run function) {
  const Lock lock(mutex);
  return std::exchange(run, function);
}
/// The calls since the last recorder_clear(): lines of words, the last of which is the error returned.
const char* recorder_events() {
  const Lock lock(mutex);
  joined.clear();
  for (const std::string& event : events) joined += event + "\n";
  return joined.c_str();
}
void recorder_clear() {
  const Lock lock(mutex);
  events.clear();
}
/// This stream is being captured from now on; UINT64_MAX: none is.
void recorder_capture(uint64_t stream) {
  const Lock lock(mutex);
  captured_stream = stream;
}
/// This function returns the error from now on; 0: no longer.
void recorder_fail(const char* function, int error) {
  const Lock lock(mutex);
  failures.erase(function);
  if (error) failures[function] = error;
}
/// What a block may have of shared memory with opt-in: 163 KB on sm_80, 99 on sm_86, 89 and 120, 227 on sm_90 and 100.
void recorder_shared_limit(uint64_t bytes) {
  const Lock lock(mutex);
  limit_of_shared = bytes;
}
int recorder_device() { return device; }
int recorder_last_error() { return last_error; }
}
#pragma GCC visibility pop

// ------------------------------------------------------------------------------------------- what launchers may call

cudaError_t cudaGetDevice(int* current) {
  const Lock lock(mutex);
  *current = device;
  return note("cudaGetDevice", cudaSuccess, "get_device");
}
cudaError_t cudaSetDevice(int wanted) {
  const Lock lock(mutex);
  cudaError_t error = cudaSuccess;
  if (wanted < 0 || wanted >= DEVICES)
    error =
        refuse(cudaErrorInvalidDevice, "there are " + text(DEVICES) + " devices, no device " + std::to_string(wanted));
  error = note("cudaSetDevice", error, "set_device", std::to_string(wanted));
  if (!error) device = wanted;
  return error;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const Lock lock(mutex);
  cudaError_t error = cudaSuccess;
  if (!kernels.count(kernel)) {
    error = refuse(cudaErrorInvalidDeviceFunction, "no such kernel");
  } else if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    error = refuse(cudaErrorInvalidValue, "attribute " + text(attribute) + " is none of a launcher's");
  } else if (value < 0 || uint64_t(value) > limit_of_shared) {
    error = refuse(cudaErrorInvalidValue, "a block has at most " + text(limit_of_shared) +
                                              " bytes of shared memory here, not " + std::to_string(value));
  }
  error = note("cudaFuncSetAttribute", error, "attribute", known(kernel).name, text(device), std::to_string(value));
  if (!error) opted_in[{kernel, device}] = value;
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex);
  const bool captured = reinterpret_cast<uint64_t>(stream) == captured_stream;
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return note("cudaStreamIsCapturing", cudaSuccess, "is_capturing");
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  message = reason + " (error " + text(error) + ")";
  return message.c_str();
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}

extern "C" {

#define FORBIDDEN(function) \
  cudaError_t function(...) { return forbidden(#function); }
#include "forbidden.inc"

// ------------------------------------------------------------------------------------ what nvcc itself puts in objects

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  register_kernel(stub, name, nullptr);
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return forbidden("kernel<<<>>>"); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return forbidden("kernel<<<>>>"); }
cudaError_t __cudaGetKernel(const void** kernel, const void* stub) { return *kernel = stub, cudaSuccess; }
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               void* stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
}
