// Which kernel, and how many tokens at once: decided once for all formats.
#pragma once
#include <cstdint>
#include <type_traits>

#include "number.cuh"

namespace sparsify_cuda {

// Up to how many tokens each version is used. Where the borders really lie is for a GPU to say (docs/gpu.md); so far
// they are where the bytes and operations of the versions put them, the same on every architecture.
constexpr int64_t kMostDecoded24 = 1;  // from two tokens on spmm_24_few does not unpack on the way to an FMA
constexpr int64_t kMostFew24 = 64;     // two passes over the weight; prefill has enough blocks from there on
constexpr int64_t kMostDecodedBitmask = 8;

// The activations of 8 tokens in float32 do not fit the registers.
template <class X>
constexpr int most_tokens = sizeof(X) == 2 ? 8 : 4;

// run(tokens, wide), both as types: 1, 2, 4 or `most` tokens a block; 1 where loads cannot be wide.
template <int most, class Run>
auto for_tokens(int64_t M, bool wide, Run run) {
  if (!wide) return run(std::integral_constant<int, 1>(), std::false_type());
  if (M == 1) return run(std::integral_constant<int, 1>(), std::true_type());
  if (M == 2) return run(std::integral_constant<int, 2>(), std::true_type());
  if (M <= 4) return run(std::integral_constant<int, 4>(), std::true_type());
  return run(std::integral_constant<int, most>(), std::true_type());
}

}  // namespace sparsify_cuda
