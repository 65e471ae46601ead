// y = x W^T + bias for a weight with zeros anywhere and few tokens. Differs from spmm_bitmask.cu in: one warp a row,
// whose lanes take one byte of the mask each; how many bits the lanes before hold says where a lane's values begin. Up
// to 8 tokens (4 in float32) share what was read of the weight (one, where x is not aligned for words).
//
//   lane l of a step     columns 8 l .. 8 l + 7 = one byte of the mask, up to 8 values, 8 activations of each token
#include "choose.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "number.cuh"

namespace sparsify_cuda {

constexpr int kWarps = 4;
constexpr int kBlocks = 4;  // on one processor, at least: up to 128 registers a thread, so that none spill
constexpr int kColumns = 8;  // of a lane in one step

// The sum of `count` over the lanes up to this one.
__device__ inline int sum_up_to(int count, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, count, delta);
    if (lane >= delta) count += before;
  }
  return count;
}

template <class X, class W, int tokens, bool wide>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    spmm_bitmask_decode(const X* __restrict__ x, const W* __restrict__ values, const uint8_t* __restrict__ mask,
                        const int64_t* __restrict__ row_start, const float* __restrict__ bias, X* __restrict__ y,
                        int64_t M, int64_t N, int64_t K, int64_t token_blocks) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x / token_blocks * kWarps + threadIdx.x / 32;
  const int64_t first_token = blockIdx.x % token_blocks * tokens;
  if (row >= N) return;  // the whole warp

  float sum[tokens] = {};
  const W* next = values + row_start[row];  // of the whole warp
  for (int64_t step = 0; step < K; step += 32 * kColumns) {
    const int64_t k = step + lane * kColumns;
    const uint32_t bits = k < K ? mask[row * ((K + 7) / 8) + k / 8] : 0;
    const int count = __popc(bits), up_to = sum_up_to(count, lane);
    const W* mine = next + (up_to - count);
    next += __shfl_sync(0xffffffffu, up_to, 31);

    float kept[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) kept[i] = bits >> i & 1 ? to_float(*mine++) : 0.0f;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      uint32_t words[kColumns * sizeof(X) / 4];
      const int64_t token = first_token + t;
      load_many_words<wide>(words, x + token * K + k, token < M ? (K - k) * int64_t(sizeof(X)) : 0);
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (bits >> i & 1) sum[t] += kept[i] * element<X>(words, i);  // 0 times NaN would be NaN
    }
  }
#pragma unroll
  for (int t = 0; t < tokens; ++t) {
    const float all = warp_sum(sum[t]);
    if (lane == 0 && first_token + t < M) y[(first_token + t) * N + row] = from_float<X>(all + (bias ? bias[row] : 0));
  }
}

extern "C" cudaError_t sparsify_spmm_bitmask_decode(DType x_type, DType w_type, const void* x, const void* values,
                                                    const uint8_t* mask, const int64_t* row_start, const float* bias,
                                                    void* y, int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0) return cudaErrorInvalidValue;
  return for_types(x_type, w_type, [&](auto x_of, auto w_of) {
    using X = decltype(x_of);
    using W = decltype(w_of);
    if (M == 0 || N == 0) return cudaSuccess;
    const auto run = [&](auto tokens_of, auto wide_of) {
      constexpr int tokens = decltype(tokens_of)::value;
      constexpr bool wide = decltype(wide_of)::value;
      const int64_t token_blocks = ceil_div(M, tokens), blocks = token_blocks * ceil_div(N, kWarps);
      if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
      return launch(spmm_bitmask_decode<X, W, tokens, wide>, dim3(unsigned(blocks)), dim3(32 * kWarps), stream,
                    static_cast<const X*>(x), static_cast<const W*>(values), mask, row_start, bias, static_cast<X*>(y),
                    M, N, K, token_blocks);
    };
    return for_tokens<most_tokens<X>>(M, all_wide(K, x, nullptr, nullptr), run);
  });
}

}  // namespace sparsify_cuda
