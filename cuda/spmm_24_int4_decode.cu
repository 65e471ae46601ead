// y = x' W^T + bias for a 2:4 weight of 4-bit codes and few tokens. Differs from spmm_24_int4.cu in: one warp a row,
// whose lanes take 32 neighbouring columns each, which share a scale; up to 8 tokens share what was read of the weight
// (one, where the arrays are not aligned for words).
//
//   lane l of a step     columns 32 l .. 32 l + 31 = 16 values in 8 bytes, 32 bits of indices, 32 codes of each token
//
// One byte permutation picks the codes that four kept weights meet, one instruction multiplies and adds the four.
#include "choose.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "number.cuh"

namespace sparsify_cuda {

constexpr int kWarps = 4;
constexpr int kBlocks = 4;  // on one processor, at least: up to 128 registers a thread, so that none spill
constexpr int kColumns = 32;  // of a lane in one step

// Four 4-bit codes, 8 added to each, as four signed bytes.
__device__ inline uint32_t signed_codes(uint32_t halves) {
  uint32_t bytes = (halves | halves << 8) & 0x00ff00ff;
  bytes = (bytes | bytes << 4) & 0x0f0f0f0f;
  return ((bytes | 0x80808080) - 0x08080808) ^ 0x80808080;  // the high bits keep bytes from borrowing
}

// Of the codes of 8 columns, in two words, the four that the indices of two groups keep.
__device__ inline uint32_t pick_four(uint32_t low, uint32_t high, uint32_t indices) {
  uint32_t digits = (indices | indices << 4) & 0x0f0f;  // a byte for each group
  digits = (digits | digits << 2) & 0x3333;             // a digit for each index
  return __byte_perm(low, high, digits + 0x4400);       // the second group is in the second word
}

template <class Y, int tokens, bool wide>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    spmm_24_int4_decode(const int8_t* __restrict__ codes, const float* __restrict__ steps,
                        const uint8_t* __restrict__ values, const uint8_t* __restrict__ indices,
                        const __half* __restrict__ scales, const float* __restrict__ bias, Y* __restrict__ y, int64_t M,
                        int64_t N, int64_t K, int64_t pitch, int group_bits, int64_t token_blocks) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x / token_blocks * kWarps + threadIdx.x / 32;
  const int64_t first_token = blockIdx.x % token_blocks * tokens;
  if (row >= N) return;  // the whole warp

  const __half* row_scales = scales + row * (((K - 1) >> group_bits) + 1);
  float sum[tokens] = {};
  for (int64_t k = lane * kColumns; k < K; k += 32 * kColumns) {
    uint32_t kept[2], places[1];
    load_words<wide>(kept, values + row * (K / 4) + k / 4, (K - k) / 4);
    load_words<wide>(places, indices + row * ((K + 7) / 8) + k / 8, (K - k + 7) / 8);
    const float scale = to_float(row_scales[k >> group_bits]);
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      uint32_t x[8];  // 0 behind column K, so what stands for weights there does not matter
      const int64_t token = first_token + t;
      load_many_words<wide>(x, codes + token * pitch + k, token < M ? pitch - k : 0);
      int products = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        products = __dp4a(int(signed_codes(kept[i / 2] >> i % 2 * 16 & 0xffff)),
                          int(pick_four(x[2 * i], x[2 * i + 1], places[0] >> 8 * i & 0xff)), products);
      sum[t] += scale * float(products);
    }
  }
#pragma unroll
  for (int t = 0; t < tokens; ++t) {
    const float all = warp_sum(sum[t]);
    const int64_t token = first_token + t;
    if (lane == 0 && token < M) y[token * N + row] = from_float<Y>(all * steps[token] + (bias ? bias[row] : 0.0f));
  }
}

extern "C" cudaError_t sparsify_spmm_24_int4(DType y_type, const int8_t* codes, const float* steps,
                                             const uint8_t* values, const uint8_t* indices, const void* scales,
                                             const float* bias, void* y, int64_t M, int64_t N, int64_t K, int32_t group,
                                             cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4 || (group != 32 && group != 64 && group != 128)) return cudaErrorInvalidValue;
  return for_type(y_type, [&](auto y_of) {
    using Y = decltype(y_of);
    if (M == 0 || N == 0) return cudaSuccess;
    const auto run = [&](auto tokens_of, auto wide_of) {
      constexpr int tokens = decltype(tokens_of)::value;
      constexpr bool wide = decltype(wide_of)::value;
      const int64_t token_blocks = ceil_div(M, tokens), blocks = token_blocks * ceil_div(N, kWarps);
      if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
      return launch(spmm_24_int4_decode<Y, tokens, wide>, dim3(unsigned(blocks)), dim3(32 * kWarps), stream, codes,
                    steps, values, indices, static_cast<const __half*>(scales), bias, static_cast<Y*>(y), M, N, K,
                    code_pitch(K), group == 32 ? 5 : group == 64 ? 6 : 7, token_blocks);
    };
    return for_tokens<8>(M, all_wide(K, codes, values, indices), run);
  });
}

}  // namespace sparsify_cuda
