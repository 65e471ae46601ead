// y = x W^T + bias for a 2:4 weight, one output a thread: the readable version. The faster ones, spmm_24_decode.cu and
// spmm_24_prefill.cu, must agree with it. Layouts: kernels.h.
#include "choose.cuh"
#include "launch.cuh"
#include "number.cuh"

namespace sparsify_cuda {

template <class X, class W>
__global__ void spmm_24_readable(const X* x, const W* values, const uint8_t* indices, const float* bias, X* y,
                                 int64_t M, int64_t N, int64_t K) {
  const int64_t output = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;  // 64 bits: M N passes 2^31
  if (output >= M * N) return;
  const int64_t token = output / N, row = output % N;

  float sum = bias ? bias[row] : 0.0f;
  for (int64_t group = 0; group < K / 4; ++group) {
    const int code = indices[row * ((K + 7) / 8) + group / 2] >> group % 2 * 4;
    const W* kept = values + row * (K / 2) + 2 * group;
    const X* from = x + token * K + 4 * group;
    sum += to_float(kept[0]) * to_float(from[code & 3]);
    sum += to_float(kept[1]) * to_float(from[code >> 2 & 3]);
  }
  y[output] = from_float<X>(sum);
}

extern "C" cudaError_t sparsify_spmm_24_readable(DType x_type, DType w_type, const void* x, const void* values,
                                                 const uint8_t* indices, const float* bias, void* y, int64_t M,
                                                 int64_t N, int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4) return cudaErrorInvalidValue;
  return for_types(x_type, w_type, [&](auto x_of, auto w_of) {
    using X = decltype(x_of);
    using W = decltype(w_of);
    const int64_t blocks = ceil_div(M * N, 256);
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(spmm_24_readable<X, W>, dim3(unsigned(blocks)), dim3(256), stream, static_cast<const X*>(x),
                  static_cast<const W*>(values), indices, bias, static_cast<X*>(y), M, N, K);
  });
}

extern "C" cudaError_t sparsify_spmm_24(DType x_type, DType w_type, const void* x, const void* values,
                                        const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N,
                                        int64_t K, cudaStream_t stream) {
  const auto run = M <= kMostDecoded24 || !has_tensor_cores(x_type, w_type) ? sparsify_spmm_24_decode
                   : M <= kMostFew24                                        ? sparsify_spmm_24_few
                                                                            : sparsify_spmm_24_prefill;
  return run(x_type, w_type, x, values, indices, bias, y, M, N, K, stream);
}

}  // namespace sparsify_cuda
