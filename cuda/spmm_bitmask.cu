// y = x W^T + bias for a weight with zeros anywhere, one output a thread: the readable version. The faster ones,
// spmm_bitmask_decode.cu and spmm_bitmask_prefill.cu, must agree with it. Layouts: kernels.h.
#include "choose.cuh"
#include "launch.cuh"
#include "number.cuh"

namespace sparsify_cuda {

template <class X, class W>
__global__ void spmm_bitmask_readable(const X* x, const W* values, const uint8_t* mask, const int64_t* row_start,
                                      const float* bias, X* y, int64_t M, int64_t N, int64_t K) {
  const int64_t output = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (output >= M * N) return;
  const int64_t token = output / N, row = output % N;

  float sum = bias ? bias[row] : 0.0f;
  int64_t next = row_start[row];
  for (int64_t k = 0; k < K; ++k)
    if (mask[row * ((K + 7) / 8) + k / 8] >> k % 8 & 1) sum += to_float(values[next++]) * to_float(x[token * K + k]);
  y[output] = from_float<X>(sum);
}

extern "C" cudaError_t sparsify_spmm_bitmask_readable(DType x_type, DType w_type, const void* x, const void* values,
                                                      const uint8_t* mask, const int64_t* row_start, const float* bias,
                                                      void* y, int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0) return cudaErrorInvalidValue;
  return for_types(x_type, w_type, [&](auto x_of, auto w_of) {
    using X = decltype(x_of);
    using W = decltype(w_of);
    const int64_t blocks = ceil_div(M * N, 256);
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(spmm_bitmask_readable<X, W>, dim3(unsigned(blocks)), dim3(256), stream, static_cast<const X*>(x),
                  static_cast<const W*>(values), mask, row_start, bias, static_cast<X*>(y), M, N, K);
  });
}

extern "C" cudaError_t sparsify_spmm_bitmask(DType x_type, DType w_type, const void* x, const void* values,
                                             const uint8_t* mask, const int64_t* row_start, const float* bias, void* y,
                                             int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  const bool prefill = M > kMostDecodedBitmask && has_tensor_cores(x_type, w_type);
  return (prefill ? sparsify_spmm_bitmask_prefill : sparsify_spmm_bitmask_decode)(x_type, w_type, x, values, mask,
                                                                                  row_start, bias, y, M, N, K, stream);
}

}  // namespace sparsify_cuda
