#include <cuda_runtime_api.h>

#include "llmbuilder/cuda.h"

namespace llmbuilder::gpu {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace llmbuilder::gpu
