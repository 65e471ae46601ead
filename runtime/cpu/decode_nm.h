// Few tokens, half-dense N:M (1:2, 2:4, 4:8, 8:16, 16:32): the columns in the lanes, each packed byte read once.
//
// kLanes kept values belong to 2 * kLanes neighbouring columns, so both halves of x fit in two registers and the
// position of a value in its group, plus the group's start, is its place in them:
//
//   x       x0 x1 x2 x3 | x4 x5 x6 x7 | ...     2 * kLanes columns in two registers
//   index    1  3       |  0  2       | ...     2:4: 16 two-bit indices = one 32-bit word, one shift per lane
//   place    1  3       |  4  6       | ...     + group start: the operand of one two-register permutation
//   sum     += value * x[place]                 one FMA
//
// Memory is the limit (68 bytes for 16 fp32 values), so the rest only has to keep up: several rows share the loads of
// x and give independent sums; several tokens share the unpacked values and places.
#pragma once
#include "kept_list.h"

namespace sparsify { namespace {

constexpr int64_t kDecodeRows = 4;

template <class V, DType type, int bits, int T>
struct NmRows {
  const NmWeight& w;
  const char* values[kDecodeRows];
  const uint8_t* indices[kDecodeRows];
  typename V::F sum[kDecodeRows][T];

  // Adds the products of kLanes kept values a row, `count` of them valid, with the columns that begin at x.
  template <bool whole>
  __attribute__((always_inline)) void step(const float* x, int64_t x_stride, int64_t columns, typename V::I group_start, int64_t count) {
    typename V::F value[kDecodeRows];
    typename V::I place[kDecodeRows];
    for (int r = 0; r < kDecodeRows; ++r) {
      value[r] = whole ? V::template load_values<type>(values[r]) : load_some_values<V, type>(values[r], count);
      place[r] = V::add(group_start, whole ? V::template positions<bits>(indices[r])
                                           : load_some_positions<V, bits>(indices[r], count));
      values[r] += V::kLanes * byte_size(type);
      indices[r] += V::kLanes * bits / 8;
    }
    for (int t = 0; t < T; ++t) {
      const char* at = reinterpret_cast<const char*>(x + t * x_stride);
      const typename V::F low =
          whole ? V::load(x + t * x_stride) : load_some_values<V, DType::f32>(at, columns);
      const typename V::F high = whole ? V::load(x + t * x_stride + V::kLanes)
                                       : load_some_values<V, DType::f32>(at + V::kLanes * 4, columns - V::kLanes);
      for (int r = 0; r < kDecodeRows; ++r)
        sum[r][t] = V::fma(value[r], V::select(low, place[r], high), sum[r][t]);
    }
  }
};

// T tokens, rows row .. row + kDecodeRows (those at or behind row_last are computed twice, not written).
template <class V, DType type, int bits, int T>
void decode_nm_rows(const NmWeight& w, const float* x, const float* bias, float* y, int64_t row, int64_t row_last,
                    typename V::I group_start) {
  NmRows<V, type, bits, T> rows{w, {}, {}, {}};
  for (int r = 0; r < kDecodeRows; ++r) {
    const int64_t at = row + r < row_last ? row + r : row_last - 1;
    rows.values[r] = static_cast<const char*>(w.values) + at * w.kept_per_row() * int64_t(byte_size(type));
    rows.indices[r] = w.indices + at * w.index_bytes_per_row();
    for (int t = 0; t < T; ++t) rows.sum[r][t] = V::zero();
  }
  int64_t k = 0;
  for (; k + 2 * V::kLanes <= w.cols; k += 2 * V::kLanes)
    rows.template step<true>(x + k, w.cols, 2 * V::kLanes, group_start, V::kLanes);
  if (k < w.cols) rows.template step<false>(x + k, w.cols, w.cols - k, group_start, (w.cols - k) / 2);
  for (int r = 0; r < kDecodeRows && row + r < row_last; ++r)
    for (int t = 0; t < T; ++t)
      y[t * w.rows + row + r] = V::sum(rows.sum[r][t]) + (bias ? bias[row + r] : 0.0f);
}

template <class V>
bool can_decode_nm(const NmWeight& w) {
  return 2 * w.n == w.m && 2 * V::kLanes % w.m == 0;
}

template <class V, DType type, int bits>
void decode_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
               int64_t row_last) {
  uint32_t start[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) start[i] = uint32_t(i / w.n * w.m);
  const typename V::I group_start = V::load(start);
  for (; row < row_last; row += kDecodeRows)
    for (int64_t token = 0; token < tokens;) {  // the rows stay in cache from one group of tokens to the next
      const float* from = x + token * w.cols;
      float* to = y + token * w.rows;
      switch (tokens - token) {
        case 1: decode_nm_rows<V, type, bits, 1>(w, from, bias, to, row, row_last, group_start); token += 1; break;
        case 2: decode_nm_rows<V, type, bits, 2>(w, from, bias, to, row, row_last, group_start); token += 2; break;
        case 3: decode_nm_rows<V, type, bits, 3>(w, from, bias, to, row, row_last, group_start); token += 3; break;
        default: decode_nm_rows<V, type, bits, 4>(w, from, bias, to, row, row_last, group_start); token += 4; break;
      }
    }
}

}}  // namespace sparsify::
