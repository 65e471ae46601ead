// Few tokens, any pattern as mask bits: the columns in the lanes, each packed byte read once.
//
//   mask bits   1 0 0 1 1 0 ...          kLanes of them
//   values      a b c                    popcount(bits) of them, the next ones in order
//   expanded    a 0 0 b c 0 ...          one expand (from a register: on Zen its memory form is microcoded)
//   sum        += expanded * x           one FMA, only in the lanes that are kept: 0 * inf would be NaN
//
// The only chain from step to step is the address of the next values, one addition. Several rows give independent
// sums; several tokens share the expanded values.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "unrolled.h"

namespace sparsify { namespace {

// How many rows ahead to prefetch when a few rows are read side by side, which the hardware follows badly: rows are
// short and the next ones begin elsewhere. About 24 KiB hides the latency of memory. Behind the end of a task it
// fetches what the next task needs into the shared level 3 cache; behind the end of the array it does nothing.
[[maybe_unused]] int64_t rows_to_prefetch(int64_t row_bytes) { return ((24 << 10) / (row_bytes + 1) + 4) / 4 * 4; }

constexpr int kMaskRows = 4;  // read side by side

struct MaskRow {
  const char* values;
  const uint8_t* mask;
};

// T tokens, the first `count` of kMaskRows rows; the others are computed and not written. The rows' values lie one
// after another, and up to `end` may be read.
template <class V, DType type, int T>
void decode_mask_rows(const MaskRow (&rows)[kMaskRows], const char* end, int count, int64_t cols, const float* x,
                      const float* bias, float* y, int64_t y_stride, int64_t values_ahead, int64_t mask_ahead) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  constexpr int R = kMaskRows;
  const char* values[R];
  typename V::F sum[R][T];
  unrolled<R>([&](auto r) SPARSIFY_INLINE {
    values[r] = rows[r].values;
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[r][t] = V::zero(); });
  });

  // A step of 32 columns reads at most 32 + kLanes values from where a row stands: while that may be read, also if it
  // belongs to the next rows, loads need no check. The last row is the one to ask.
  int64_t k = 0;
  for (; k + 32 <= cols && end - values[R - 1] >= (32 + V::kLanes) * kSize; k += 32)
    unrolled<R>([&](auto r) SPARSIFY_INLINE {
      uint32_t word;
      std::memcpy(&word, rows[r].mask + k / 8, 4);
      prefetch(values[r] + values_ahead);
      if (kSize == 4) prefetch(values[r] + values_ahead + 64);
      if (k % 512 == 0) prefetch(rows[r].mask + k / 8 + mask_ahead);
      unrolled<32 / V::kLanes>([&](auto part) SPARSIFY_INLINE {
        const uint32_t bits = word >> part * V::kLanes & ((1u << V::kLanes) - 1);
        const typename V::F value = V::expand(bits, V::template load_values<type>(values[r]));
        values[r] += __builtin_popcount(bits) * kSize;
        unrolled<T>([&](auto t) SPARSIFY_INLINE {
          sum[r][t] = V::fma_where(bits, value, V::load(x + t * cols + k + part * V::kLanes), sum[r][t]);
        });
      });
    });
  for (; k < cols; k += 8)
    unrolled<R>([&](auto r) SPARSIFY_INLINE {
      const uint32_t bits = rows[r].mask[k / 8];
      const typename V::F value = V::expand(bits, load_some_values<V, type>(values[r], (end - values[r]) / kSize));
      values[r] += __builtin_popcount(bits) * kSize;
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        const float* at = x + t * cols + k;
        sum[r][t] = V::fma_where(bits, value, V::load_where(bits, at), sum[r][t]);
      });
    });
  unrolled<R>([&](auto r) SPARSIFY_INLINE {
    if (r >= count) return;
    unrolled<T>([&](auto t) SPARSIFY_INLINE { y[t * y_stride + r] = V::sum(sum[r][t]) + (bias ? bias[r] : 0.0f); });
  });
}

// Rows row .. row + count of y for all tokens; `ahead` rows are prefetched meanwhile.
template <class V, DType type>
void decode_mask(const MaskRow (&group)[kMaskRows], const char* end, int count, int64_t rows, int64_t cols, const float* x,
                 int64_t tokens, const float* bias, float* y, int64_t row, int64_t value_bytes, int64_t mask_bytes) {
  const float* add = bias ? bias + row : nullptr;
  const int64_t ahead = rows_to_prefetch(value_bytes + mask_bytes);
  int64_t values = ahead * value_bytes, mask = ahead * mask_bytes;
  for (int64_t token = 0; token < tokens;) {  // the rows stay in cache from one group of tokens to the next
    const float* from = x + token * cols;
    float* to = y + token * rows + row;
    switch (tokens - token) {
      case 1: decode_mask_rows<V, type, 1>(group, end, count, cols, from, add, to, rows, values, mask); token += 1; break;
      case 2: decode_mask_rows<V, type, 2>(group, end, count, cols, from, add, to, rows, values, mask); token += 2; break;
      case 3: decode_mask_rows<V, type, 3>(group, end, count, cols, from, add, to, rows, values, mask); token += 3; break;
      default: decode_mask_rows<V, type, 4>(group, end, count, cols, from, add, to, rows, values, mask); token += 4; break;
    }
    values = mask = 0;
  }
}

// A bitmask weight whose values are multiplied as they are stored.
template <class V, DType type>
void decode_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
                    int64_t row_last) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  const char* const begin = static_cast<const char*>(w.values);
  const char* const end = begin + w.row_start[w.rows] * kSize;
  for (; row < row_last; row += kMaskRows) {
    MaskRow group[kMaskRows];
    for (int r = 0; r < kMaskRows; ++r) {
      const int64_t at = row + r < row_last ? row + r : row_last - 1;
      group[r] = {begin + w.row_start[at] * kSize, w.mask + at * w.mask_bytes_per_row()};
    }
    const int count = int(row_last - row < kMaskRows ? row_last - row : kMaskRows);
    decode_mask<V, type>(group, end, count, w.rows, w.cols, x, tokens, bias, y, row,
                         w.row_start[w.rows] / w.rows * kSize, w.mask_bytes_per_row());
  }
}

// Everything else, a few rows at a time made into float32 values and mask bits.
template <class V, class Weight>
void decode_unpacked(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
                     int64_t row_last) {
  thread_local KeptScratch<float> values_room;
  thread_local KeptScratch<uint64_t> words_room;
  const int64_t most = w.cols, words = mask_words(w.cols), all = kMaskRows * most + 32 + V::kLanes;
  float* values = values_room.get(all);
  const char* end = reinterpret_cast<const char*>(values + all);
  uint64_t* masks = words_room.get(kMaskRows * words);
  for (; row < row_last; row += kMaskRows) {
    MaskRow group[kMaskRows];
    for (int r = 0; r < kMaskRows; ++r) {
      const int64_t at = row + r < row_last ? row + r : row_last - 1;
      float* to = values + r * most;
      if (const float* from = row_values<V>(w, at, to); from != to)
        std::memcpy(to, from, size_t(kept_in_row(w, at)) * sizeof(float));
      row_mask(w, at, masks + r * words);
      group[r] = {reinterpret_cast<const char*>(to), reinterpret_cast<const uint8_t*>(masks + r * words)};
    }
    const int count = int(row_last - row < kMaskRows ? row_last - row : kMaskRows);
    decode_mask<V, DType::f32>(group, end, count, w.rows, w.cols, x, tokens, bias, y, row, 0, 0);
  }
}

}}  // namespace sparsify::
