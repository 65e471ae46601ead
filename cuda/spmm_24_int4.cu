// y = x' W^T + bias for a 2:4 weight of 4-bit codes and x' of 8-bit codes, one output a thread: the readable version.
// The faster one, spmm_24_int4_decode.cu, must agree with it. Layouts: kernels.h.
#include "launch.cuh"
#include "number.cuh"

namespace sparsify_cuda {

template <class Y>
__global__ void spmm_24_int4_readable(const int8_t* codes, const float* steps, const uint8_t* values,
                                      const uint8_t* indices, const __half* scales, const float* bias, Y* y, int64_t M,
                                      int64_t N, int64_t K, int64_t pitch, int64_t group) {
  const int64_t output = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (output >= M * N) return;
  const int64_t token = output / N, row = output % N;

  float sum = 0.0f;
  for (int64_t first = 0; first < K; first += group) {  // columns that share a scale
    int products = 0;
    for (int64_t k = first; k < first + group && k < K; k += 4) {
      const int code = indices[row * ((K + 7) / 8) + k / 8] >> k / 4 % 2 * 4;
      const int pair = values[row * (K / 4) + k / 4];
      const int8_t* from = codes + token * pitch + k;
      products += ((pair & 15) - 8) * from[code & 3] + ((pair >> 4) - 8) * from[code >> 2 & 3];
    }
    sum += to_float(scales[row * ((K + group - 1) / group) + first / group]) * float(products);
  }
  y[output] = from_float<Y>(sum * steps[token] + (bias ? bias[row] : 0.0f));
}

extern "C" cudaError_t sparsify_spmm_24_int4_readable(DType y_type, const int8_t* codes, const float* steps,
                                                      const uint8_t* values, const uint8_t* indices, const void* scales,
                                                      const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                                                      int32_t group, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4 || (group != 32 && group != 64 && group != 128)) return cudaErrorInvalidValue;
  return for_type(y_type, [&](auto y_of) {
    using Y = decltype(y_of);
    const int64_t blocks = ceil_div(M * N, 256);
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(spmm_24_int4_readable<Y>, dim3(unsigned(blocks)), dim3(256), stream, codes, steps, values, indices,
                  static_cast<const __half*>(scales), bias, static_cast<Y*>(y), M, N, K, code_pitch(K), int64_t{group});
  });
}

}  // namespace sparsify_cuda
