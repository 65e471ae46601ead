// Which kernel, and how many tokens at once: decided once for all formats.
#pragma once
#include <cstdint>
#include <type_traits>

#include "number.cuh"

namespace sparsify_cuda {

// Up to here decode reads the weight once. Where tensor cores really begin to pay is for a GPU to say (docs/gpu.md).
constexpr int64_t kMostDecoded = 8;

inline bool prefers_prefill(int64_t M, DType x, DType w) { return M > kMostDecoded && has_tensor_cores(x, w); }

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
