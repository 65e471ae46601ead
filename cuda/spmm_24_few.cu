// y = x W^T + bias for a 2:4 weight and a few tokens. Differs from spmm_24_prefill.cu in: the time is that of reading
// the weight, so blocks are small and many, and the four warps of one split its columns among them (split-K). A warp
// has stages of its own and waits for no other; their sums are added at the end, always in the same order.
//
//   tile of a block      32 rows of W x `tokens` tokens (8, 16 or 32)
//   warp w of 4          columns 64 w .. 64 w + 63 of every 256: 32 kept weights a row, 2 x tokens / 8 products of 16
//                        rows x 8 tokens, twice
//
// Values, activations and indices come by cp.async, stages - 1 steps ahead. Pieces of 16 bytes lie in shared memory at
// places that are swapped by their row (swizzled), so that the 8 rows of an ldmatrix are in different banks. ldmatrix
// cannot make the metadata: it wants the indices of rows g and g + 8 side by side, which the file does not have. Two
// loads of 2 bytes, from different banks or the same word, are no more instructions than to put them there.
#include <type_traits>

#include "launch.cuh"
#include "tile_24.cuh"

namespace sparsify_cuda {

constexpr int kRows = 32, kColumns = 64;  // of a step
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlocks = 3;  // on one processor: as many as shared memory allows, so registers need not be fewer

template <class T, int tokens>
struct alignas(16) Few24 {
  T values[kRows][kColumns / 2];
  T x[tokens][kColumns];
  uint16_t indices[kRows][kColumns / 16];

  // Piece `piece` of 8 elements of a row.
  __device__ T* values_at(int row, int piece) { return &values[row][8 * (piece ^ (row / 2 % 4))]; }
  __device__ T* x_at(int token, int piece) { return &x[token][8 * (piece ^ token % 8)]; }
};

// With 32 tokens a fourth stage would be more than the 99 KiB that every GPU from sm_80 on has.
template <int tokens>
constexpr int kStages = tokens == 32 ? 3 : 4;

template <class T, int tokens>
constexpr int kBytes = kWarps * kStages<tokens> * int(sizeof(Few24<T, tokens>));

// Begins to fill a stage of this warp with the columns from `column` on.
template <bool wide, class T, int tokens>
__device__ void bring(Few24<T, tokens>& stage, const T* x, const T* values, const uint8_t* indices, int64_t first_row,
                      int64_t first_token, int64_t column, int64_t M, int64_t N, int64_t K, int lane) {
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const int row = 8 * i + lane / 4, piece = lane % 4;
    const int64_t at = column / 2 + 8 * piece;
    const bool inside = first_row + row < N && at < K / 2;  // an address must exist even where nothing is read
    bring_8<wide>(stage.values_at(row, piece), inside ? values + (first_row + row) * (K / 2) + at : values,
                  inside ? K / 2 - at : 0);
  }
#pragma unroll
  for (int i = 0; i < tokens / 4; ++i) {
    const int token = 4 * i + lane / 8, piece = lane % 8;
    const int64_t at = column + 8 * piece;
    const bool inside = first_token + token < M && at < K;
    bring_8<wide>(stage.x_at(token, piece), inside ? x + (first_token + token) * K + at : x, inside ? K - at : 0);
  }
  const int64_t row = first_row + lane;
  if constexpr (wide) {
    for (int half = 0; half < 2; ++half) {
      const bool inside = row < N && column + 32 * half < K;
      cp_async_4(&stage.indices[lane][2 * half], inside ? indices + row * (K / 8) + column / 8 + 4 * half : indices,
                 inside);
    }
  } else {
    for (int i = 0; i < 4; ++i)
      stage.indices[lane][i] = uint16_t(codes_of_16<false>(indices, row, column + 16 * i, N, K));
  }
}

// 32 columns of a stage, number `selector`.
template <int selector, class T, int tokens>
__device__ void multiply(float (&sum)[2][tokens / 8][4], Few24<T, tokens>& stage, const uint32_t (&metadata)[2],
                         int lane) {
  uint32_t b[tokens / 8][4];
#pragma unroll
  for (int t = 0; t < tokens / 8; ++t)  // 8 tokens x 32 columns: four 8 x 8 matrices side by side
    ldmatrix_x4(b[t], stage.x_at(8 * t + lane % 8, 4 * selector + lane / 8));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t a[4];  // 16 rows x 16 kept: upper left, lower left, upper right, lower right
    ldmatrix_x4(a, stage.values_at(16 * r + lane % 16, 2 * selector + lane / 16));
#pragma unroll
    for (int t = 0; t < tokens / 8; ++t) mma_sp_m16n8k32<T, selector>(sum[r][t], a, b[t], metadata[r]);
  }
}

template <class T, int tokens, bool wide>
__global__ void __launch_bounds__(kThreads, kBlocks)
    spmm_24_few(const T* __restrict__ x, const T* __restrict__ values, const uint8_t* __restrict__ indices,
                const float* __restrict__ bias, T* __restrict__ y, int64_t M, int64_t N, int64_t K,
                int64_t token_blocks) {
  constexpr int stages = kStages<tokens>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = blockIdx.x / token_blocks * kRows;
  const int64_t first_token = blockIdx.x % token_blocks * tokens;  // neighbours in time share the weight's lines
  auto* mine = reinterpret_cast<Few24<T, tokens>*>(dynamic_shared()) + warp * stages;

  float sum[2][tokens / 8][4] = {};  // 16 rows, 8 tokens, the lane's four elements
  int64_t coming = warp * kColumns;  // the column of the next step to bring
  const auto bring_next = [&](int stage) {
    if (coming < K) bring<wide>(mine[stage], x, values, indices, first_row, first_token, coming, M, N, K, lane);
    coming += kWarps * kColumns;
    cp_async_commit();  // an empty group too, so that counting them is simple
  };
#pragma unroll
  for (int stage = 0; stage < stages - 1; ++stage) bring_next(stage);

  int now = 0;
  for (int64_t column = warp * kColumns; column < K; column += kWarps * kColumns) {
    cp_async_wait<stages - 2>();
    __syncwarp();  // what all lanes brought is there, and all have read the stage that is filled next
    bring_next(now == 0 ? stages - 1 : now - 1);
    Few24<T, tokens>& stage = mine[now];
    uint32_t metadata[2];
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * r + lane / 4, place = lane % 4;
      const bool exists = column + 16 * place < K;
      const uint32_t upper = exists && first_row + row < N ? stage.indices[row][place] : kNoCodes;
      const uint32_t lower = exists && first_row + row + 8 < N ? stage.indices[row + 8][place] : kNoCodes;
      metadata[r] = upper | lower << 16;
    }
    multiply<0>(sum, stage, metadata, lane);
    multiply<1>(sum, stage, metadata, lane);
    now = now == stages - 1 ? 0 : now + 1;
  }

  __syncthreads();  // before the sums are written over other warps' stages
  constexpr int pitch = kRows + 4;  // the four tokens of a quad are then in different banks
  auto* sums = reinterpret_cast<float*>(dynamic_shared());  // [warp][token][row]
  for (int r = 0; r < 2; ++r)
    for (int t = 0; t < tokens / 8; ++t)
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * r + lane / 4 + 8 * (i / 2), token = 8 * t + lane % 4 * 2 + i % 2;
        sums[(warp * tokens + token) * pitch + row] = sum[r][t][i];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
    const int64_t row = first_row + i % kRows, token = first_token + i / kRows;
    if (row >= N || token >= M) continue;
    float all = bias ? bias[row] : 0.0f;
    for (int w = 0; w < kWarps; ++w) all += sums[(w * tokens + i / kRows) * pitch + i % kRows];
    y[token * N + row] = from_float<T>(all);
  }
}

extern "C" cudaError_t sparsify_spmm_24_few(DType x_type, DType w_type, const void* x, const void* values,
                                            const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N,
                                            int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4 || !has_tensor_cores(x_type, w_type)) return cudaErrorInvalidValue;
  const auto run = [&](auto type, auto tokens_of, auto wide_of) {
    using T = decltype(type);
    constexpr int tokens = decltype(tokens_of)::value;
    constexpr bool wide = decltype(wide_of)::value;
    const int64_t token_blocks = ceil_div(M, tokens), blocks = ceil_div(N, kRows) * token_blocks;
    if (blocks == 0) return cudaSuccess;
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    return launch_with_shared(kBytes<T, tokens>, spmm_24_few<T, tokens, wide>, dim3(unsigned(blocks)), dim3(kThreads),
                              stream, static_cast<const T*>(x), static_cast<const T*>(values), indices, bias,
                              static_cast<T*>(y), M, N, K, token_blocks);
  };
  const auto run_type = [&](auto type) {
    using Eight = std::integral_constant<int, 8>;
    if (!all_wide(K, x, values, indices)) return run(type, Eight(), std::false_type());
    if (M <= 8) return run(type, Eight(), std::true_type());
    if (M <= 16) return run(type, std::integral_constant<int, 16>(), std::true_type());
    return run(type, std::integral_constant<int, 32>(), std::true_type());
  };
  return x_type == DType::f16 ? run_type(__half()) : run_type(__nv_bfloat16());
}

}  // namespace sparsify_cuda
