// The kernels of a processor with AMX: bfloat16, 8 and 4 bits on tiles, everything else as in avx512bf16.cpp. Compiled by
// amx.cpp for the processor's own tiles and by amx_model.cpp for the model of them.
#pragma once
#include "amx.h"

namespace sparsify { namespace {

constexpr int64_t kFewTokens = 2;  // up to here memory is the limit, and vectors read it faster

template <class Weight>
bool on_tiles(const Weight& w, int64_t tokens) {
  return tokens > kFewTokens && w.rows > 0 && w.type != DType::f32 && w.type != DType::f16;
}

inline void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (!on_tiles(w, tokens) || !linear_tiles(w, x, tokens, bias, y, parallel))
    kAvx512Bf16.linear_nm(w, x, tokens, bias, y, parallel);
}

inline void linear_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                           const Parallel& parallel) {
  if (!on_tiles(w, tokens) || !linear_tiles(w, x, tokens, bias, y, parallel))
    kAvx512Bf16.linear_bitmask(w, x, tokens, bias, y, parallel);
}

constexpr Kernels tile_kernels(const char* isa) {
  return {isa,
          linear_nm,
          linear_bitmask,
          [](auto... a) { kAvx512.pairwise_max_sum(a...); },
          [](auto... a) { return kAvx512.read_all(a...); },
          [](auto... a) { return kAvx512.fma_burst(a...); }};
}

}}  // namespace sparsify::
