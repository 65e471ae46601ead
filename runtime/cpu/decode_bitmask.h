// Few tokens, bitmask: the columns in the lanes, each packed byte read once.
//
//   mask bits   1 0 0 1 1 0 ...          kLanes of them
//   values      a b c                    popcount(bits) of them, the next ones in order
//   expanded    a 0 0 b c 0 ...          one expand (from a register: on Zen its memory form is microcoded)
//   sum        += expanded * x           one FMA, only in the lanes that are kept: 0 * inf would be NaN
//
// The only chain from step to step is the address of the next values, one addition. Several rows give independent
// sums; several tokens share the expanded values.
#pragma once
#include "kept_list.h"

namespace sparsify { namespace {

template <class V, DType type, int R, int T>
struct BitmaskRows {
  const char* values[R];
  const char* values_end;  // values are read kLanes at a time up to here
  typename V::F sum[R][T];

  __attribute__((always_inline)) void step(int r, uint32_t bits, const float* x, int64_t x_stride, bool whole) {
    constexpr int64_t kSize = int64_t(byte_size(type));
    const int64_t left = values_end - values[r];
    const typename V::F packed = __builtin_expect(left >= V::kLanes * kSize, 1)
                                     ? V::template load_values<type>(values[r])
                                     : load_some_values<V, type>(values[r], left / kSize);
    const typename V::F value = V::expand(bits, packed);
    values[r] += __builtin_popcount(bits) * kSize;
    for (int t = 0; t < T; ++t) {
      const float* at = x + t * x_stride;
      sum[r][t] = V::fma_where(bits, value, whole ? V::load(at) : V::load_where(bits, at), sum[r][t]);
    }
  }
};

template <class V, DType type, int R, int T>
void decode_bitmask_rows(const BitmaskWeight& w, const float* x, const float* bias, float* y, int64_t row,
                         int64_t row_last) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  BitmaskRows<V, type, R, T> rows;
  const uint8_t* mask[R];
  const char* values = static_cast<const char*>(w.values);
  rows.values_end = values + w.row_start[w.rows] * kSize;
  for (int r = 0; r < R; ++r) {
    const int64_t at = row + r < row_last ? row + r : row_last - 1;
    rows.values[r] = values + w.row_start[at] * kSize;
    mask[r] = w.mask + at * w.mask_bytes_per_row();
    for (int t = 0; t < T; ++t) rows.sum[r][t] = V::zero();
  }
  int64_t k = 0;
  for (; k + 32 <= w.cols; k += 32)
    for (int r = 0; r < R; ++r) {
      uint32_t bits;
      std::memcpy(&bits, mask[r] + k / 8, 4);
#pragma GCC unroll 4
      for (int lane = 0; lane < 32; lane += V::kLanes)
        rows.step(r, bits >> lane & ((1u << V::kLanes) - 1), x + k + lane, w.cols, true);
    }
  for (; k < w.cols; k += 8)
    for (int r = 0; r < R; ++r) rows.step(r, mask[r][k / 8], x + k, w.cols, false);
  for (int r = 0; r < R && row + r < row_last; ++r)
    for (int t = 0; t < T; ++t)
      y[t * w.rows + row + r] = V::sum(rows.sum[r][t]) + (bias ? bias[row + r] : 0.0f);
}

template <class V, DType type>
void decode_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
                    int64_t row_last) {
  for (; row < row_last; row += 4)
    for (int64_t token = 0; token < tokens;) {  // the rows stay in cache from one group of tokens to the next
      const float* from = x + token * w.cols;
      float* to = y + token * w.rows;
      const int64_t last = row + 4 < row_last ? row + 4 : row_last;
      switch (tokens - token) {
        case 1: decode_bitmask_rows<V, type, 4, 1>(w, from, bias, to, row, last); token += 1; break;
        case 2: decode_bitmask_rows<V, type, 4, 2>(w, from, bias, to, row, last); token += 2; break;
        case 3: decode_bitmask_rows<V, type, 4, 3>(w, from, bias, to, row, last); token += 3; break;
        default: decode_bitmask_rows<V, type, 4, 4>(w, from, bias, to, row, last); token += 4; break;
      }
    }
}

}}  // namespace sparsify::
