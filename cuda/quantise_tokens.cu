// Every token as 8-bit codes times one step, as passes/dialect/storage.py: quantise_tokens defines it. A block a token.
#include "launch.cuh"
#include "number.cuh"

namespace sparsify_cuda {

constexpr int kThreads = 256;

// The largest over a block of `kThreads`, in every thread. NaN counts as more than everything.
__device__ inline float block_max(float value) {
  __shared__ float of_warp[kThreads / 32];
  const auto larger = [](float a, float b) { return a > b || a != a ? a : b; };
  for (int bits = 16; bits > 0; bits /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, bits));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kThreads / 32; ++i) value = larger(value, of_warp[i]);
  return value;
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    quantise_tokens(const X* __restrict__ x, int8_t* __restrict__ codes, float* __restrict__ steps, int64_t K,
                    int64_t pitch) {
  const X* token = x + blockIdx.x * K;
  float largest = 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const float size = fabsf(to_float(token[k]));
    largest = size > largest || size != size ? size : largest;
  }
  largest = block_max(largest);

  const bool finite = largest <= 3.402823466e38f;  // false for NaN
  const float step = largest / 127.0f;
  const bool zero = !finite || step < 1.175494351e-38f;  // the smallest normal float32
  for (int64_t k = threadIdx.x; k < pitch; k += kThreads)
    codes[blockIdx.x * pitch + k] = int8_t(zero || k >= K ? 0.0f : rintf(to_float(token[k]) / step));
  if (threadIdx.x == 0) steps[blockIdx.x] = !finite ? __uint_as_float(0x7fc00000) : zero ? 0.0f : step;
}

extern "C" cudaError_t sparsify_quantise_tokens(DType x_type, const void* x, int8_t* codes, float* steps, int64_t M,
                                                int64_t K, cudaStream_t stream) {
  if (M < 0 || K < 0) return cudaErrorInvalidValue;
  return for_type(x_type, [&](auto x_of) {
    using X = decltype(x_of);
    if (M == 0) return cudaSuccess;
    if (!fits_grid(M)) return cudaErrorInvalidConfiguration;
    return launch(quantise_tokens<X>, dim3(unsigned(M)), dim3(kThreads), stream, static_cast<const X*>(x), codes, steps,
                  K, code_pitch(K));
  });
}

}  // namespace sparsify_cuda
