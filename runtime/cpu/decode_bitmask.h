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
#include "unrolled.h"

namespace sparsify { namespace {

// T tokens, rows row .. row + R (those at or behind row_last are computed twice, not written).
template <class V, DType type, int R, int T>
void decode_bitmask_rows(const BitmaskWeight& w, const float* x, const float* bias, float* y, int64_t row,
                         int64_t row_last, int64_t values_ahead, int64_t mask_ahead) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  const char* values[R];
  const uint8_t* mask[R];
  typename V::F sum[R][T];
  const char* const begin = static_cast<const char*>(w.values);
  const char* const end = begin + w.row_start[w.rows] * kSize;
  unrolled<R>([&](auto r) SPARSIFY_INLINE {
    const int64_t at = row + r < row_last ? row + r : row_last - 1;
    values[r] = begin + w.row_start[at] * kSize;
    mask[r] = w.mask + at * w.mask_bytes_per_row();
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[r][t] = V::zero(); });
  });

  // A step of 32 columns reads at most 32 + kLanes values from where a row stands: while that is in the array, also if
  // it belongs to the next rows, loads need no check. Rows follow each other, so the last one is the one to ask.
  int64_t k = 0;
  for (; k + 32 <= w.cols && end - values[R - 1] >= (32 + V::kLanes) * kSize; k += 32)
    unrolled<R>([&](auto r) SPARSIFY_INLINE {
      uint32_t word;
      std::memcpy(&word, mask[r] + k / 8, 4);
      prefetch(values[r] + values_ahead);
      if (kSize == 4) prefetch(values[r] + values_ahead + 64);
      if (k % 512 == 0) prefetch(mask[r] + k / 8 + mask_ahead);
      unrolled<32 / V::kLanes>([&](auto part) SPARSIFY_INLINE {
        const uint32_t bits = word >> part * V::kLanes & ((1u << V::kLanes) - 1);
        const typename V::F value = V::expand(bits, V::template load_values<type>(values[r]));
        values[r] += __builtin_popcount(bits) * kSize;
        unrolled<T>([&](auto t) SPARSIFY_INLINE {
          sum[r][t] = V::fma_where(bits, value, V::load(x + t * w.cols + k + part * V::kLanes), sum[r][t]);
        });
      });
    });
  for (; k < w.cols; k += 8)
    unrolled<R>([&](auto r) SPARSIFY_INLINE {
      const uint32_t bits = mask[r][k / 8];
      const typename V::F value = V::expand(bits, load_some_values<V, type>(values[r], (end - values[r]) / kSize));
      values[r] += __builtin_popcount(bits) * kSize;
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        const float* at = x + t * w.cols + k;
        sum[r][t] = V::fma_where(bits, value, V::load_where(bits, at), sum[r][t]);
      });
    });
  unrolled<R>([&](auto r) SPARSIFY_INLINE {
    if (row + r >= row_last) return;
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      y[t * w.rows + row + r] = V::sum(sum[r][t]) + (bias ? bias[row + r] : 0.0f);
    });
  });
}

template <class V, DType type>
void decode_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
                    int64_t row_last) {
  const int64_t value_bytes = w.row_start[w.rows] / w.rows * int64_t(byte_size(type));  // of a row, on average
  for (; row < row_last; row += 4)
    for (int64_t token = 0; token < tokens;) {  // the rows stay in cache from one group of tokens to the next
      const float* from = x + token * w.cols;
      float* to = y + token * w.rows;
      const int64_t last = row + 4 < row_last ? row + 4 : row_last;
      const int64_t ahead = token == 0 ? rows_to_prefetch(value_bytes + w.mask_bytes_per_row()) : 0;
      const int64_t values = ahead * value_bytes, mask = ahead * w.mask_bytes_per_row();
      switch (tokens - token) {
        case 1: decode_bitmask_rows<V, type, 4, 1>(w, from, bias, to, row, last, values, mask); token += 1; break;
        case 2: decode_bitmask_rows<V, type, 4, 2>(w, from, bias, to, row, last, values, mask); token += 2; break;
        case 3: decode_bitmask_rows<V, type, 4, 3>(w, from, bias, to, row, last, values, mask); token += 3; break;
        default: decode_bitmask_rows<V, type, 4, 4>(w, from, bias, to, row, last, values, mask); token += 4; break;
      }
    }
}

}}  // namespace sparsify::
