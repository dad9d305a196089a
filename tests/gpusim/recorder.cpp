// A recording stand-in for the CUDA runtime: the launchers that nvcc compiled link with it instead of cudart. It runs
// no kernel and needs no driver; it notes each call, and refuses what a GPU would refuse.
//
// There are four devices, and stream s belongs to device s / 256. Functions that allocate, copy or wait are there only
// to be noted as forbidden.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

// As in cuda_runtime_api.h, which isn't included: its prototypes would not let `forbidden` be written as below.
struct dim3 {
  unsigned x, y, z;
};
enum Error {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  INVALID_CONFIGURATION = 9,
  INVALID_DEVICE = 101,
  INVALID_KERNEL = 98,
  INVALID_HANDLE = 400,
  CAPTURE_UNSUPPORTED = 900
};
constexpr int DEVICES = 4, STREAMS = 256, MAX_DYNAMIC_SHARED = 8, CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1;

uint64_t shared_limit = 99 << 10;
std::vector<std::string> events;
std::map<const void*, std::string> kernels;                 // by their stubs
std::map<std::pair<const void*, int>, int> dynamic_shared;  // that a kernel may have on a device
std::map<std::string, int> failures;                        // what functions are told to return
uint64_t captured_stream = UINT64_MAX;
int device, last_error;
std::string joined;

template <class... Parts>
std::string words(const Parts&... parts) {
  std::string line;
  const auto add = [&](const std::string& part) { line += (line.empty() ? "" : "\t") + part; };
  (add(parts), ...);
  return line;
}
std::string text(uint64_t number) { return std::to_string(number); }
std::string text(dim3 d) { return text(d.x) + "," + text(d.y) + "," + text(d.z); }

int note(const std::string& function, const std::string& event, int error = SUCCESS) {
  if (const auto told = failures.find(function); told != failures.end()) error = told->second;
  events.push_back(words(event, text(error)));
  if (error) last_error = error;
  return error;
}

int forbidden(const char* function) { return note(function, words("forbidden", function), CAPTURE_UNSUPPORTED); }

int check_launch(const void* stub, dim3 grid, dim3 block, uint64_t shared, uint64_t stream) {
  if (!kernels.count(stub)) return INVALID_KERNEL;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return INVALID_CONFIGURATION;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return INVALID_CONFIGURATION;
  const auto allowed = dynamic_shared.find({stub, device});
  if (shared > uint64_t(allowed == dynamic_shared.end() ? 48 << 10 : allowed->second)) return INVALID_VALUE;
  return int(stream / STREAMS) == device ? SUCCESS : INVALID_HANDLE;
}

int launch(const void* stub, dim3 grid, dim3 block, uint64_t shared, void* stream) {
  const auto number = reinterpret_cast<uint64_t>(stream);
  const auto kernel = kernels.find(stub);
  const std::string name = kernel == kernels.end() ? "unknown" : kernel->second;
  return note("cudaLaunchKernel",
              words("launch", name, text(device), text(number), text(grid), text(block), text(shared)),
              check_launch(stub, grid, block, shared, number));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ----------------------------------------------------------------------------------------------- what Python may ask

/// The calls since the last recorder_clear(): lines of words, the last of which is the error returned.
const char* recorder_events() {
  joined.clear();
  for (const std::string& event : events) joined += event + "\n";
  return joined.c_str();
}
void recorder_clear() { events.clear(); }
/// This stream is being captured from now on; UINT64_MAX: none is.
void recorder_capture(uint64_t stream) { captured_stream = stream; }
/// This function returns the error from now on; 0: no longer.
void recorder_fail(const char* function, int error) {
  failures.erase(function);
  if (error) failures[function] = error;
}
int recorder_device() { return device; }
int recorder_last_error() { return last_error; }
}
#pragma GCC visibility pop

extern "C" {

// ------------------------------------------------------------------------------------------ what launchers may call

int cudaGetDevice(int* current) {
  *current = device;
  return note("cudaGetDevice", "get_device");
}
int cudaSetDevice(int wanted) {
  const int error = note("cudaSetDevice", words("set_device", text(uint64_t(wanted))),
                         wanted >= 0 && wanted < DEVICES ? SUCCESS : INVALID_DEVICE);
  if (!error) device = wanted;
  return error;
}
int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  const bool right = kernels.count(stub) && attribute == MAX_DYNAMIC_SHARED && value >= 0 && value <= int(shared_limit);
  const std::string name = kernels.count(stub) ? kernels[stub] : "unknown";
  const int error = note("cudaFuncSetAttribute", words("attribute", name, text(device), text(uint64_t(value))),
                         right ? SUCCESS : INVALID_VALUE);
  if (!error) dynamic_shared[{stub, device}] = value;
  return error;
}
int cudaStreamIsCapturing(void* stream, int* status) {
  *status = reinterpret_cast<uint64_t>(stream) == captured_stream ? CAPTURE_ACTIVE : CAPTURE_NONE;
  return note("cudaStreamIsCapturing", "is_capturing");
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = SUCCESS;
  return error;
}
const char* cudaGetErrorString(int error) {
  static std::string message;
  message = "recorded error " + std::to_string(error);
  return message.c_str();
}
int cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared, void* stream) {
  return launch(stub, grid, block, shared, stream);
}

// ------------------------------------------------------------------------------------ what nvcc itself puts in objects

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels[stub] = name;
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return unsigned(forbidden("kernel<<<>>>")); }
int __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return forbidden("kernel<<<>>>"); }
int __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = const_cast<void*>(stub);
  return SUCCESS;
}
int __cudaLaunchKernel(void* stub, dim3 grid, dim3 block, void**, size_t shared, void* stream) {
  return launch(stub, grid, block, shared, stream);
}

// ------------------------------------------------------------------------------------------ what launchers must not
// call

#define FORBIDDEN(function) \
  int function(...) { return forbidden(#function); }
FORBIDDEN(cudaMalloc)
FORBIDDEN(cudaMallocAsync)
FORBIDDEN(cudaMallocHost)
FORBIDDEN(cudaMallocManaged)
FORBIDDEN(cudaHostAlloc)
FORBIDDEN(cudaFree)
FORBIDDEN(cudaFreeAsync)
FORBIDDEN(cudaFreeHost)
FORBIDDEN(cudaMemcpy)
FORBIDDEN(cudaMemcpyAsync)
FORBIDDEN(cudaMemset)
FORBIDDEN(cudaDeviceSynchronize)
FORBIDDEN(cudaStreamSynchronize)
FORBIDDEN(cudaStreamCreate)
FORBIDDEN(cudaStreamQuery)
FORBIDDEN(cudaEventCreate)
FORBIDDEN(cudaEventRecord)
FORBIDDEN(cudaEventSynchronize)
FORBIDDEN(cudaFuncGetAttributes)
FORBIDDEN(cudaFuncSetCacheConfig)
}
