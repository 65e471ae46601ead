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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of so many blocks in x, where 2^31 - 1 are allowed.
inline bool fits_grid(int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace sparsify_cuda
