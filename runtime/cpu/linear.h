// y = x W^T + bias for one vector instruction set V: which kernel, and how the work is cut into tasks.
//
//   few tokens     columns in the lanes (decode_nm.h, decode_bitmask.h): limited by memory
//   some, 2:4      columns in the lanes, two rows at a time (row_pairs.h, AVX-512 only)
//   many           tokens in the lanes (tile.h): limited by the level 1 cache
//
// The choice and the cuts depend on the shape only, never on the number of threads.
#pragma once
#include <type_traits>

#include "decode_bitmask.h"
#include "decode_nm.h"
#include "pairwise_max_sum.h"
#include "quantise_tokens.h"
#include "roofline.h"
#include "row_tasks.h"
#include "tile.h"
#ifdef __AVX512F__
#include "row_pairs.h"
#endif

namespace sparsify { namespace {

constexpr int64_t kDecodeTokens = 8;
#ifdef __AVX512F__
constexpr int64_t kDecodeTokens24 = 2, kTileTokens24 = 28;  // row pairs in between, as measured
#endif

template <class V, DType type>
void decode_nm_typed(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
                     int64_t row_last) {
  switch (w.index_bits()) {
    case 1: return decode_nm<V, type, 1>(w, x, tokens, bias, y, row, row_last);
    case 2: return decode_nm<V, type, 2>(w, x, tokens, bias, y, row, row_last);
    case 4: return decode_nm<V, type, 4>(w, x, tokens, bias, y, row, row_last);
    default: return decode_nm<V, type, 8>(w, x, tokens, bias, y, row, row_last);
  }
}

template <class V>
void decode(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
            int64_t row_last) {
  if (!can_decode_nm<V>(w)) return decode_unpacked<V>(w, x, tokens, bias, y, row, row_last);
  switch (w.type) {
    case DType::f16: return decode_nm_typed<V, DType::f16>(w, x, tokens, bias, y, row, row_last);
    case DType::bf16: return decode_nm_typed<V, DType::bf16>(w, x, tokens, bias, y, row, row_last);
    default: return decode_nm_typed<V, DType::f32>(w, x, tokens, bias, y, row, row_last);
  }
}

template <class V>
void decode(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
            int64_t row_last) {
  switch (w.type) {
    case DType::f32: return decode_bitmask<V, DType::f32>(w, x, tokens, bias, y, row, row_last);
    case DType::f16: return decode_bitmask<V, DType::f16>(w, x, tokens, bias, y, row, row_last);
    case DType::bf16: return decode_bitmask<V, DType::bf16>(w, x, tokens, bias, y, row, row_last);
    default: return decode_unpacked<V>(w, x, tokens, bias, y, row, row_last);
  }
}

template <class V, class Weight>
void linear_float(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                  const Parallel& parallel) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Weight, NmWeight>)
    if (w.n == 2 && w.m == 4 && tokens > kDecodeTokens24 && tokens < kTileTokens24)
      return linear_row_pairs(w, x, tokens, bias, y, parallel);
#endif
  if (tokens > kDecodeTokens) return linear_tiled<V>(w, x, tokens, bias, y, parallel);
  for_row_tasks(w.rows, weight_bytes(w), parallel, [&](int64_t row, int64_t row_last) {
    decode<V>(w, x, tokens, bias, y, row, row_last);
  });
}

// Quantised weights are multiplied as float32, by activations that went through their own codes and back.
template <class V, class Weight>
void linear(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  if (!is_quantised(w.type)) return linear_float<V>(w, x, tokens, bias, y, parallel);
  Scratch<float> rounded = scratch<float>(tokens * w.cols);
  auto round = [&](int64_t token) { round_token<V>(x + token * w.cols, w.cols, rounded.get() + token * w.cols); };
  parallel_for(parallel, tokens, round);
  linear_float<V>(w, rounded.get(), tokens, bias, y, parallel);
  for (int64_t token = 0; token < tokens; ++token)  // a row without kept weights would not see the NaN
    if (w.cols > 0 && rounded[token * w.cols] != rounded[token * w.cols])
      for (int64_t row = 0; row < w.rows; ++row) y[token * w.rows + row] = rounded[token * w.cols];
}

template <class V>
constexpr Kernels make_kernels(const char* isa) {
  return {isa, linear<V, NmWeight>, linear<V, BitmaskWeight>, pairwise_max_sum<V>, read_all<V>, fma_burst<V>, nullptr};
}

}}  // namespace sparsify::
