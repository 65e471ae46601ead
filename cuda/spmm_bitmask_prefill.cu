// y = x W^T + bias for a weight with zeros anywhere and many tokens: load sparse, compute dense. Differs from
// spmm_bitmask.cu in: a block unpacks a tile of W into shared memory, zeros included, and multiplies it on tensor cores
// (ptx.cuh: mma). Memory is read as little as in decode; the arithmetic is that of the dense product.
//
//   tile of a block      64 rows of W x 64 tokens, in steps of 64 columns
//   thread 2 r + h       unpacks columns 32 h .. + 31 of row r of the tile
//   warp (wr, wt) of 4   rows 32 wr .. + 31, tokens 32 wt .. + 31, as 2 x 4 products of 16 rows x 8 tokens
//
// W is the first operand, so the product is y^T = W x^T; row-major x is the column-major B that the instruction wants.
#include <type_traits>

#include "launch.cuh"
#include "load.cuh"
#include "ptx.cuh"

namespace sparsify_cuda {

constexpr int kRows = 64, kTokens = 64, kColumns = 64;
constexpr int kThreads = 128;

// Rows of shared memory are padded by 16 bytes: the 8 rows of an ldmatrix then lie in different banks.
template <class T>
struct alignas(16) DenseTile {
  T w[kRows][kColumns + 8];
  T x[kTokens][kColumns + 8];
};

// Unpacks 32 columns of one row: `bits` says which are there, `from` holds their values.
template <class T>
__device__ void unpack_32(T* to, uint32_t bits, const T* from) {
  const uint16_t* next = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (bits >> (8 * i + j) & 1) words[j / 2] |= uint32_t(*next++) << j % 2 * 16;
    *reinterpret_cast<uint4*>(to + 8 * i) = uint4{words[0], words[1], words[2], words[3]};
  }
}

template <bool wide, class T>
__device__ void bring_x(DenseTile<T>& stage, const T* x, int64_t first_token, int64_t column, int64_t M, int64_t K) {
  for (int i = threadIdx.x; i < kTokens * (kColumns / 8); i += kThreads) {
    const int64_t token = first_token + i / (kColumns / 8), at = column + i % (kColumns / 8) * 8;
    const bool inside = token < M && at < K;
    T* to = &stage.x[token - first_token][at - column];
    const T* from = inside ? x + token * K + at : x;  // an address must exist even where nothing is read
    if constexpr (wide) {
      cp_async_16(to, from, inside);
    } else {
      uint32_t words[4];
      load_words<false>(words, from, inside ? (K - at) * int64_t(sizeof(T)) : 0);
      *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
    }
  }
  cp_async_commit();
}

template <class T, bool wide>
__global__ void __launch_bounds__(kThreads)
    spmm_bitmask_prefill(const T* __restrict__ x, const T* __restrict__ values, const uint8_t* __restrict__ mask,
                         const int64_t* __restrict__ row_start, const float* __restrict__ bias, T* __restrict__ y,
                         int64_t M, int64_t N, int64_t K, int64_t row_blocks) {
  __shared__ DenseTile<T> stages[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * 32, warp_token = warp % 2 * 32;
  const int64_t first_row = blockIdx.x % row_blocks * kRows, first_token = blockIdx.x / row_blocks * kTokens;

  const int half = threadIdx.x % 2;  // of the row that this thread unpacks
  const int64_t my_row = first_row + threadIdx.x / 2;
  const T* next = values + (my_row < N ? row_start[my_row] : 0);  // where the row's values for this step begin
  const auto unpack = [&](DenseTile<T>& stage, int64_t column) {
    uint32_t bits[1] = {0};
    if (my_row < N) {
      const int64_t at = column + 32 * half;
      const uint8_t* from = mask + my_row * ((K + 7) / 8) + at / 8;
      if constexpr (wide)
        load_words<true>(bits, from, K - at);
      else
        load_words<false>(bits, from, (K - at + 7) / 8);
    }
    const int count = __popc(bits[0]), other = __shfl_xor_sync(0xffffffffu, count, 1);
    unpack_32(&stage.w[threadIdx.x / 2][32 * half], bits[0], next + (half ? other : 0));
    next += count + other;
  };

  float sum[2][4][4] = {};  // 16 rows, 8 tokens, the lane's four elements
  bring_x<wide>(stages[0], x, first_token, 0, M, K);
  unpack(stages[0], 0);
  int now = 0;
  for (int64_t column = 0; column < K; column += kColumns, now ^= 1) {
    if (const int64_t then = column + kColumns; then < K) {
      bring_x<wide>(stages[now ^ 1], x, first_token, then, M, K);
      unpack(stages[now ^ 1], then);
      cp_async_wait<1>();  // all but what was just begun
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const DenseTile<T>& stage = stages[now];
    for (int k = 0; k < kColumns; k += 16) {
      uint32_t a[2][4], b[2][4];
      for (int r = 0; r < 2; ++r)  // 16 rows x 16 columns: upper left, lower left, upper right, lower right
        ldmatrix_x4(a[r], &stage.w[warp_row + 16 * r + lane % 16][k + lane / 16 * 8]);
      for (int t = 0; t < 2; ++t)  // 16 tokens x 16 columns: two matrices for the first 8 tokens, two for the others
        ldmatrix_x4(b[t], &stage.x[warp_token + 16 * t + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
      for (int r = 0; r < 2; ++r)
        for (int t = 0; t < 4; ++t) {
          const uint32_t b_of_8[2] = {b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]};
          mma_m16n8k16<T>(sum[r][t], a[r], b_of_8);
        }
    }
    __syncthreads();  // before the next round writes over this stage
  }

  for (int r = 0; r < 2; ++r)
    for (int lower = 0; lower < 2; ++lower) {
      const int64_t row = first_row + warp_row + 16 * r + lane / 4 + 8 * lower;
      if (row >= N) continue;
      const float add = bias ? bias[row] : 0.0f;
      for (int t = 0; t < 4; ++t)
        for (int i = 0; i < 2; ++i) {
          const int64_t token = first_token + warp_token + 8 * t + lane % 4 * 2 + i;
          if (token < M) y[token * N + row] = from_float<T>(sum[r][t][2 * lower + i] + add);
        }
    }
}

extern "C" cudaError_t sparsify_spmm_bitmask_prefill(DType x_type, DType w_type, const void* x, const void* values,
                                                     const uint8_t* mask, const int64_t* row_start, const float* bias,
                                                     void* y, int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || !has_tensor_cores(x_type, w_type)) return cudaErrorInvalidValue;
  const auto run = [&](auto type, auto wide_of) {
    using T = decltype(type);
    constexpr bool wide = decltype(wide_of)::value;
    const int64_t row_blocks = ceil_div(N, kRows), blocks = row_blocks * ceil_div(M, kTokens);
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch(spmm_bitmask_prefill<T, wide>, dim3(unsigned(blocks)), dim3(kThreads), stream,
                  static_cast<const T*>(x), static_cast<const T*>(values), mask, row_start, bias, static_cast<T*>(y), M,
                  N, K, row_blocks);
  };
  const bool wide = all_wide(K, x, mask, nullptr);
  if (x_type == DType::f16) return wide ? run(__half(), std::true_type()) : run(__half(), std::false_type());
  return wide ? run(__nv_bfloat16(), std::true_type()) : run(__nv_bfloat16(), std::false_type());
}

}  // namespace sparsify_cuda
