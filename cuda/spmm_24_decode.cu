// y = x W^T + bias for a 2:4 weight and few tokens. Differs from spmm_24.cu in: one warp a row, whose lanes take 16
// neighbouring columns each and read them in words; up to 8 tokens (4 in float32) share what was read of the weight
// (one, where the arrays are not aligned for words).
//
//   lane l of a step     columns 16 l .. 16 l + 15 = 8 values, 16 bits of indices, 16 activations of each token
//
// Memory is the limit: 9 bytes for 8 columns in 16 bits. Two 16-bit activations of four are picked by one byte
// permutation, so the arithmetic keeps up.
#include "choose.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "number.cuh"

namespace sparsify_cuda {

constexpr int kWarps = 4;
constexpr int kBlocks = 4;  // on one processor, at least: up to 128 registers a thread, so that none spill
constexpr int kColumns = 16;  // of a lane in one step

// The two activations of a group that its code keeps; words: the group's four.
template <class X>
__device__ void pick(const uint32_t* words, uint32_t code, float& first, float& second) {
  const uint32_t low = code & 3, high = code >> 2 & 3;
  if constexpr (std::is_same_v<X, float>) {
    first = __uint_as_float(low & 2 ? (low & 1 ? words[3] : words[2]) : (low & 1 ? words[1] : words[0]));
    second = __uint_as_float(high & 2 ? (high & 1 ? words[3] : words[2]) : (high & 1 ? words[1] : words[0]));
  } else {
    // Bytes 2 low, 2 low + 1, 2 high, 2 high + 1 of the eight, as four digits of the selector.
    const uint32_t both = __byte_perm(words[0], words[1], (low | high << 8) * 0x22 + 0x1010);
    first = element<X>(&both, 0);
    second = element<X>(&both, 1);
  }
}

template <class X, class W, int tokens, bool wide>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    spmm_24_decode(const X* __restrict__ x, const W* __restrict__ values, const uint8_t* __restrict__ indices,
                   const float* __restrict__ bias, X* __restrict__ y, int64_t M, int64_t N, int64_t K,
                   int64_t token_blocks) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x / token_blocks * kWarps + threadIdx.x / 32;
  const int64_t first_token = blockIdx.x % token_blocks * tokens;  // neighbours in time share the weight's lines
  if (row >= N) return;  // the whole warp

  float sum[tokens] = {};
#pragma unroll(wide && tokens <= 2 ? 2 : 1)
  for (int64_t k = lane * kColumns; k < K; k += 32 * kColumns) {
    constexpr int kValueWords = kColumns / 2 * sizeof(W) / 4, kWords = kColumns * sizeof(X) / 4;
    uint32_t kept[kValueWords];
    load_many_words<wide>(kept, values + row * (K / 2) + k / 2, (K - k) / 2 * int64_t(sizeof(W)));
    uint32_t codes;
    const uint8_t* at = indices + row * ((K + 7) / 8) + k / 8;
    if constexpr (wide)
      codes = *reinterpret_cast<const uint16_t*>(at);
    else
      codes = at[0] | (K - k > 8 ? at[1] << 8 : 0);
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      uint32_t words[kWords];
      const int64_t token = first_token + t;
      load_many_words<wide>(words, x + token * K + k, token < M ? (K - k) * int64_t(sizeof(X)) : 0);
#pragma unroll
      for (int group = 0; group < kColumns / 4; ++group) {
        float first, second;
        pick<X>(words + group * int(sizeof(X)), codes >> 4 * group, first, second);
        sum[t] += element<W>(kept, 2 * group) * first;
        sum[t] += element<W>(kept, 2 * group + 1) * second;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < tokens; ++t) {
    const float all = warp_sum(sum[t]);
    if (lane == 0 && first_token + t < M) y[(first_token + t) * N + row] = from_float<X>(all + (bias ? bias[row] : 0));
  }
}

extern "C" cudaError_t sparsify_spmm_24_decode(DType x_type, DType w_type, const void* x, const void* values,
                                               const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N,
                                               int64_t K, cudaStream_t stream) {
  if (M < 0 || N < 0 || K < 0 || K % 4) return cudaErrorInvalidValue;
  return for_types(x_type, w_type, [&](auto x_of, auto w_of) {
    using X = decltype(x_of);
    using W = decltype(w_of);
    if (M == 0 || N == 0) return cudaSuccess;
    const auto run = [&](auto tokens_of, auto wide_of) {
      constexpr int tokens = decltype(tokens_of)::value;
      constexpr bool wide = decltype(wide_of)::value;
      const int64_t token_blocks = ceil_div(M, tokens), blocks = token_blocks * ceil_div(N, kWarps);
      if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
      return launch(spmm_24_decode<X, W, tokens, wide>, dim3(unsigned(blocks)), dim3(32 * kWarps), stream,
                    static_cast<const X*>(x), static_cast<const W*>(values), indices, bias, static_cast<X*>(y), M, N, K,
                    token_blocks);
    };
    return for_tokens<most_tokens<X>>(M, all_wide(K, x, values, indices), run);
  });
}

}  // namespace sparsify_cuda
