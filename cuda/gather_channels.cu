// y[m, j] = x[m, index[j]], bit for bit: a permutation of channels that no weight can absorb. A block takes 256
// neighbours of one token, one a thread: only the reads jump, and those inside the token's row.
#include "launch.cuh"
#include "kernels.h"

namespace sparsify_cuda {

template <class Bits>
__global__ void gather_channels(const Bits* __restrict__ x, const int64_t* __restrict__ index, Bits* __restrict__ y,
                                int64_t K_in, int64_t K_out, unsigned blocks_per_token) {
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t j = int64_t{blockIdx.x % blocks_per_token} * blockDim.x + threadIdx.x;
  if (j < K_out) y[token * K_out + j] = x[token * K_in + index[j]];
}

extern "C" cudaError_t sparsify_gather_channels(int32_t element_bytes, const void* x, const int64_t* index, void* y,
                                                int64_t M, int64_t K_in, int64_t K_out, cudaStream_t stream) {
  if (M < 0 || K_in < 0 || K_out < 0 || (element_bytes != 2 && element_bytes != 4)) return cudaErrorInvalidValue;
  const auto run = [&](auto bits) {
    using Bits = decltype(bits);
    const int64_t blocks_per_token = ceil_div(K_out, 256), blocks = M * blocks_per_token;
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(gather_channels<Bits>, dim3(unsigned(blocks)), dim3(256), stream, static_cast<const Bits*>(x), index,
                  static_cast<Bits*>(y), K_in, K_out, unsigned(blocks_per_token));
  };
  return element_bytes == 2 ? run(uint16_t()) : run(uint32_t());
}

}  // namespace sparsify_cuda
