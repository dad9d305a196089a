// What no launcher may do, for tests/cuda/test_launchers.py: the recording runtime must see each.
__global__ void kernel(float* p) { *p = 1; }

#pragma GCC visibility push(default)
extern "C" void launch_badly(float* p, void* stream) {
  cudaMalloc(&p, 4);
  cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(p);
}
#pragma GCC visibility pop
