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
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int64_t kDecodeRows = 4;

// T tokens, rows row .. row + kDecodeRows (those at or behind row_last are computed twice, not written).
template <class V, DType type, int bits, int T>
void decode_nm_rows(const NmWeight& w, const float* x, const float* bias, float* y, int64_t row, int64_t row_last,
                    typename V::I group_start, int64_t rows_ahead) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  constexpr int64_t kColumns = 2 * V::kLanes;
  const char* values[kDecodeRows];
  const uint8_t* indices[kDecodeRows];
  typename V::F sum[kDecodeRows][T];
  unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
    const int64_t at = row + r < row_last ? row + r : row_last - 1;
    values[r] = static_cast<const char*>(w.values) + at * w.kept_per_row() * kSize;
    indices[r] = w.indices + at * w.index_bytes_per_row();
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[r][t] = V::zero(); });
  });

  const int64_t values_ahead = rows_ahead * w.kept_per_row() * kSize;
  const int64_t indices_ahead = rows_ahead * w.index_bytes_per_row();
  typename V::F value[kDecodeRows];
  typename V::I place[kDecodeRows];
  int64_t k = 0, i = 0;  // column, kept value
  for (; k + kColumns <= w.cols; k += kColumns, i += V::kLanes) {
    unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
      prefetch(values[r] + i * kSize + values_ahead);
      if (i * bits % 512 == 0) prefetch(indices[r] + i * bits / 8 + indices_ahead);
      value[r] = V::template load_values<type>(values[r] + i * kSize);
      place[r] = V::add(group_start, V::template positions<bits>(indices[r] + i * bits / 8));
    });
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      const typename V::F low = V::load(x + t * w.cols + k), high = V::load(x + t * w.cols + k + V::kLanes);
      unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
        sum[r][t] = V::fma(value[r], V::select(low, place[r], high), sum[r][t]);
      });
    });
  }
  if (k < w.cols) {  // the same with the lanes behind the end 0
    const int64_t columns = w.cols - k;
    unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
      value[r] = load_some_values<V, type>(values[r] + i * kSize, columns / 2);
      place[r] = V::add(group_start, load_some_positions<V, bits>(indices[r] + i * bits / 8, columns / 2));
    });
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      const char* at = reinterpret_cast<const char*>(x + t * w.cols + k);
      const typename V::F low = load_some_values<V, DType::f32>(at, columns);
      const typename V::F high = load_some_values<V, DType::f32>(at + V::kLanes * 4, columns - V::kLanes);
      unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
        sum[r][t] = V::fma(value[r], V::select(low, place[r], high), sum[r][t]);
      });
    });
  }
  unrolled<kDecodeRows>([&](auto r) SPARSIFY_INLINE {
    if (row + r >= row_last) return;
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      y[t * w.rows + row + r] = V::sum(sum[r][t]) + (bias ? bias[row + r] : 0.0f);
    });
  });
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
  const int64_t row_bytes = w.kept_per_row() * int64_t(byte_size(type)) + w.index_bytes_per_row();
  for (; row < row_last; row += kDecodeRows)
    for (int64_t token = 0; token < tokens;) {  // the rows stay in cache from one group of tokens to the next
      const int64_t ahead = token == 0 ? rows_to_prefetch(row_bytes) : 0;
      const float* from = x + token * w.cols;
      float* to = y + token * w.rows;
      switch (tokens - token) {
        case 1: decode_nm_rows<V, type, bits, 1>(w, from, bias, to, row, row_last, group_start, ahead); token += 1; break;
        case 2: decode_nm_rows<V, type, bits, 2>(w, from, bias, to, row, row_last, group_start, ahead); token += 2; break;
        case 3: decode_nm_rows<V, type, bits, 3>(w, from, bias, to, row, row_last, group_start, ahead); token += 3; break;
        default: decode_nm_rows<V, type, bits, 4>(w, from, bias, to, row, row_last, group_start, ahead); token += 4; break;
      }
    }
}

}}  // namespace sparsify::
