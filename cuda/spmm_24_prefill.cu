// y = x W^T + bias for a 2:4 weight and many tokens. Differs from spmm_24.cu in: a block computes a tile of outputs on
// sparse tensor cores (ptx.cuh: mma.sp), which read only the kept weights and pick the activations by themselves.
//
//   tile of a block      128 rows of W x 64 tokens, in steps of 64 columns: 32 kept weights a row
//   warp (wr, wt) of 4   rows 64 wr .. + 63, tokens 32 wt .. + 31, as 4 x 4 products of 16 rows x 8 tokens
//
// W is the sparse operand, so the product is y^T = W x^T; row-major x is the column-major B that the instruction wants.
// Values and activations pass through shared memory, one step ahead of their use. Indices do not: a lane takes the 16
// bits of its rows straight from the file's layout (metadata_24 in tile_24.cuh).
#include <type_traits>

#include "launch.cuh"
#include "tile_24.cuh"

namespace sparsify_cuda {

constexpr int kRows = 128, kTokens = 64, kColumns = 64;
constexpr int kThreads = 128;

// Rows of shared memory are padded by 16 bytes: the 8 rows of an ldmatrix then lie in different banks.
template <class T>
struct alignas(16) Tile24 {
  T values[kRows][kColumns / 2 + 8];
  T x[kTokens][kColumns + 8];
};

// Begins to fill a stage with the columns from `column` on.
template <bool wide, class T>
__device__ void bring(Tile24<T>& stage, const T* x, const T* values, int64_t first_row, int64_t first_token,
                      int64_t column, int64_t M, int64_t N, int64_t K) {
  for (int i = threadIdx.x; i < kRows * (kColumns / 16); i += kThreads) {
    const int64_t row = first_row + i / (kColumns / 16), at = column / 2 + i % (kColumns / 16) * 8;
    const bool inside = row < N && at < K / 2;  // an address must exist even where nothing is read
    bring_8<wide>(&stage.values[row - first_row][at - column / 2], inside ? values + row * (K / 2) + at : values,
                  inside ? K / 2 - at : 0);
  }
  for (int i = threadIdx.x; i < kTokens * (kColumns / 8); i += kThreads) {
    const int64_t token = first_token + i / (kColumns / 8), at = column + i % (kColumns / 8) * 8;
    const bool inside = token < M && at < K;
    bring_8<wide>(&stage.x[token - first_token][at - column], inside ? x + token * K + at : x, inside ? K - at : 0);
  }
  cp_async_commit();
}

// 32 columns of a stage, number `selector`: 16 products of this warp.
template <int selector, class T>
__device__ void multiply(float (&sum)[4][4][4], const Tile24<T>& stage, const uint32_t (&metadata)[4], int warp_row,
                         int warp_token, int lane) {
  uint32_t b[4][4];
  for (int t = 0; t < 4; ++t)  // 8 tokens x 32 columns: four 8 x 8 matrices side by side
    ldmatrix_x4(b[t], &stage.x[warp_token + 8 * t + lane % 8][32 * selector + lane / 8 * 8]);
  for (int r = 0; r < 4; ++r) {
    uint32_t a[4];  // 16 rows x 16 kept: upper left, lower left, upper right, lower right
    ldmatrix_x4(a, &stage.values[warp_row + 16 * r + lane % 16][16 * selector + lane / 16 * 8]);
    for (int t = 0; t < 4; ++t) mma_sp_m16n8k32<T, selector>(sum[r][t], a, b[t], metadata[r]);
  }
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads)
    spmm_24_prefill(const T* __restrict__ x, const T* __restrict__ values, const uint8_t* __restrict__ indices,
                    const float* __restrict__ bias, T* __restrict__ y, int64_t M, int64_t N, int64_t K,
                    int64_t row_blocks) {
  __shared__ Tile24<T> stages[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 64, warp_token = warp % 2 * 32;
  const int64_t first_row = blockIdx.x % row_blocks * kRows, first_token = blockIdx.x / row_blocks * kTokens;

  float sum[4][4][4] = {};  // 16 rows, 8 tokens, the lane's four elements
  uint32_t metadata[4], next_metadata[4];
  const auto bring_metadata = [&](int64_t column) {
    for (int r = 0; r < 4; ++r)
      next_metadata[r] = metadata_24<wide>(indices, first_row + warp_row + 16 * r, column, N, K, lane);
  };
  bring<wide>(stages[0], x, values, first_row, first_token, 0, M, N, K);
  bring_metadata(0);
  int now = 0;
  for (int64_t column = 0; column < K; column += kColumns, now ^= 1) {
    for (int r = 0; r < 4; ++r) metadata[r] = next_metadata[r];
    if (const int64_t next = column + kColumns; next < K) {
      bring<wide>(stages[now ^ 1], x, values, first_row, first_token, next, M, N, K);
      bring_metadata(next);
      cp_async_wait<1>();  // all but what was just begun
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply<0>(sum, stages[now], metadata, warp_row, warp_token, lane);
    multiply<1>(sum, stages[now], metadata, warp_row, warp_token, lane);
    __syncthreads();  // before the next round writes over this stage
  }

  for (int r = 0; r < 4; ++r)
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp_row + 16 * r + lane / 4 + 8 * half;
      if (row >= N) continue;
      const float add = bias ? bias[row] : 0.0f;
      for (int t = 0; t < 4; ++t)
        for (int i = 0; i < 2; ++i) {
          const int64_t token = first_token + warp_token + 8 * t + lane % 4 * 2 + i;
          if (token < M) y[token * N + row] = from_float<T>(sum[r][t][2 * half + i] + add);
        }
    }
}

extern "C" cudaError_t sparsify_spmm_24_prefill(DType x_type, DType w_type, const void* x, const void* values,
                                                const uint8_t* indices, const float* bias, void* y, int64_t M,
                                                int64_t N, int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4 || !has_tensor_cores(x_type, w_type)) return cudaErrorInvalidValue;
  const auto run = [&](auto type, auto wide_of) {
    using T = decltype(type);
    constexpr bool wide = decltype(wide_of)::value;
    const int64_t row_blocks = ceil_div(N, kRows), blocks = row_blocks * ceil_div(M, kTokens);
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(spmm_24_prefill<T, wide>, dim3(unsigned(blocks)), dim3(kThreads), stream, static_cast<const T*>(x),
                  static_cast<const T*>(values), indices, bias, static_cast<T*>(y), M, N, K, row_blocks);
  };
  const bool wide = all_wide(K, x, values, indices);
  if (x_type == DType::f16) return wide ? run(__half(), std::true_type()) : run(__half(), std::false_type());
  return wide ? run(__nv_bfloat16(), std::true_type()) : run(__nv_bfloat16(), std::false_type());
}

}  // namespace sparsify_cuda
