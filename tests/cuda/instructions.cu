// One warp runs one instruction of cuda/ptx.cuh, or of CUDA itself, on registers that a test chooses. Compiles for the
// GPU as well, so that the same fragments can be checked there. All arrays are [32][registers], a row a lane.
#include "launch.cuh"
#include "tile_24.cuh"

namespace sparsify_cuda {

template <class T>
__global__ void run_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t my_a[4], my_b[2];
  float my_d[4];
  for (int i = 0; i < 4; ++i) my_a[i] = a[4 * lane + i], my_d[i] = d[4 * lane + i];
  for (int i = 0; i < 2; ++i) my_b[i] = b[2 * lane + i];
  mma_m16n8k16<T>(my_d, my_a, my_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = my_d[i];
}

template <class T, int selector>
__global__ void run_mma_sp(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* d) {
  const int lane = threadIdx.x;
  uint32_t my_a[4], my_b[4];
  float my_d[4];
  for (int i = 0; i < 4; ++i) my_a[i] = a[4 * lane + i], my_b[i] = b[4 * lane + i], my_d[i] = d[4 * lane + i];
  mma_sp_m16n8k32<T, selector>(my_d, my_a, my_b, metadata[lane]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = my_d[i];
}

// rows [32][8] 16-bit elements, four 8 x 8 matrices one after another.
__global__ void run_ldmatrix(const uint16_t* rows, uint32_t* r) {
  alignas(16) __shared__ uint16_t matrices[32][8];
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) matrices[lane][i] = rows[8 * lane + i];
  __syncthreads();
  uint32_t mine[4];
  ldmatrix_x4(mine, matrices[lane]);
  for (int i = 0; i < 4; ++i) r[4 * lane + i] = mine[i];
}

// Copies [32] times 16 bytes in two groups, the second of which only the even lanes' exist, and looks after each wait.
__global__ void run_cp_async(const uint32_t* from, uint32_t* after_first, uint32_t* after_second) {
  alignas(16) __shared__ uint32_t room[2][32][4];
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) room[0][lane][i] = room[1][lane][i] = 7;
  cp_async_16(room[0][lane], from + 4 * lane, true);
  cp_async_commit();
  cp_async_16(room[1][lane], from + 4 * lane, lane % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) after_first[4 * lane + i] = room[0][lane][i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) after_second[4 * lane + i] = room[1][lane][i];
}

// What each lane gets from a shuffle, an exclusive-or shuffle, a shuffle up, and two votes.
__global__ void run_warp(const int32_t* from, const int32_t* source, int32_t* got) {
  const int lane = threadIdx.x;
  got[5 * lane] = __shfl_sync(0xffffffffu, from[lane], source[lane]);
  got[5 * lane + 1] = __shfl_xor_sync(0xffffffffu, from[lane], 5);
  got[5 * lane + 2] = __shfl_up_sync(0xffffffffu, from[lane], 3);
  got[5 * lane + 3] = int32_t(__ballot_sync(0xffffffffu, from[lane] > 0));
  got[5 * lane + 4] = __any_sync(0xffffffffu, from[lane] > 0) + 2 * __all_sync(0xffffffffu, from[lane] > 0);
}

template <class T>
__global__ void convert(const T* from, float* wide, const float* numbers, T* narrow, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  wide[i] = to_float(from[i]);
  narrow[i] = from_float<T>(numbers[i]);
}

__global__ void count_threads(int32_t* total) { atomicAdd(total, 1); }

__global__ void permute_and_multiply(const uint32_t* words, uint32_t* permuted, int32_t* products) {
  const int lane = threadIdx.x;
  permuted[lane] = __byte_perm(words[3 * lane], words[3 * lane + 1], words[3 * lane + 2]);
  products[lane] = __dp4a(int(words[3 * lane]), int(words[3 * lane + 1]), int(words[3 * lane + 2]));
}

// The metadata of every lane for 16 rows and 64 columns: words [row blocks][column blocks][32].
template <bool wide>
__global__ void run_metadata(const uint8_t* indices, uint32_t* words, int64_t N, int64_t K) {
  const int64_t row = 16 * int64_t{blockIdx.x}, column = 64 * int64_t{blockIdx.y};
  words[(int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * 32 + threadIdx.x] =
      metadata_24<wide>(indices, row, column, N, K, int(threadIdx.x));
}

extern "C" cudaError_t sparsify_test_metadata(int32_t wide, const uint8_t* indices, uint32_t* words, int64_t N,
                                              int64_t K, cudaStream_t stream) {
  const dim3 grid(unsigned((N + 15) / 16), unsigned((K + 63) / 64));
  return launch(wide ? run_metadata<true> : run_metadata<false>, grid, dim3(32), stream, indices, words, N, K);
}

extern "C" cudaError_t sparsify_test_mma(DType type, const uint32_t* a, const uint32_t* b, float* d,
                                         cudaStream_t stream) {
  return launch(type == DType::f16 ? run_mma<__half> : run_mma<__nv_bfloat16>, dim3(1), dim3(32), stream, a, b, d);
}

extern "C" cudaError_t sparsify_test_mma_sp(DType type, int32_t selector, const uint32_t* a, const uint32_t* b,
                                            const uint32_t* metadata, float* d, cudaStream_t stream) {
  const bool half = type == DType::f16;
  const auto kernel = selector == 0 ? (half ? run_mma_sp<__half, 0> : run_mma_sp<__nv_bfloat16, 0>)
                                    : (half ? run_mma_sp<__half, 1> : run_mma_sp<__nv_bfloat16, 1>);
  return launch(kernel, dim3(1), dim3(32), stream, a, b, metadata, d);
}

extern "C" cudaError_t sparsify_test_ldmatrix(const uint16_t* rows, uint32_t* r, cudaStream_t stream) {
  return launch(run_ldmatrix, dim3(1), dim3(32), stream, rows, r);
}

extern "C" cudaError_t sparsify_test_cp_async(const uint32_t* from, uint32_t* after_first, uint32_t* after_second,
                                              cudaStream_t stream) {
  return launch(run_cp_async, dim3(1), dim3(32), stream, from, after_first, after_second);
}

extern "C" cudaError_t sparsify_test_warp(const int32_t* from, const int32_t* source, int32_t* got,
                                          cudaStream_t stream) {
  return launch(run_warp, dim3(1), dim3(32), stream, from, source, got);
}

extern "C" cudaError_t sparsify_test_convert(DType type, const void* from, float* wide, const float* numbers,
                                             void* narrow, int64_t count, cudaStream_t stream) {
  return for_type(type, [&](auto type_of) {
    using T = decltype(type_of);
    return launch(convert<T>, dim3(unsigned(ceil_div(count, 256))), dim3(256), stream, static_cast<const T*>(from),
                  wide, numbers, static_cast<T*>(narrow), count);
  });
}

extern "C" cudaError_t sparsify_test_count(int32_t* total, cudaStream_t stream) {
  return launch(count_threads, dim3(3, 2, 2), dim3(8, 4, 2), stream, total);
}

extern "C" cudaError_t sparsify_test_bytes(const uint32_t* words, uint32_t* permuted, int32_t* products,
                                           cudaStream_t stream) {
  return launch(permute_and_multiply, dim3(1), dim3(32), stream, words, permuted, products);
}

}  // namespace sparsify_cuda
