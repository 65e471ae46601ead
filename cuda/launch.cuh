// kernel<<<grid, threads, 0, stream>>>(arguments...), in a form that both nvcc and the emulator's g++ read.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsify_cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, cudaStream_t stream,
                   Arguments... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  return emulate::launch(kernel, grid, threads, arguments...);
#endif
}

// The same with so many bytes of shared memory beside what the kernel declares: dynamic_shared(), on 16 bytes.
template <class... Parameters, class... Arguments>
cudaError_t launch_with_shared(int bytes, void (*kernel)(Parameters...), dim3 grid, dim3 threads, cudaStream_t stream,
                               Arguments... arguments) {
#ifdef __CUDACC__
  // More than 48 KiB must be asked for. It is a property of the kernel, set again to the same value each time.
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t status = cudaFuncSetAttribute(kernel, attribute, bytes); status != cudaSuccess) return status;
  kernel<<<grid, threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
#else
  const emulate::DynamicShared memory(bytes);
  return launch(kernel, grid, threads, stream, arguments...);
#endif
}

__device__ inline void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return memory;
#else
  return emulate::DynamicShared::now;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of so many blocks in x, where 2^31 - 1 are allowed.
inline bool fits_grid(int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace sparsify_cuda
