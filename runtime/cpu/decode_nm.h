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
// Memory is the limit (68 bytes for 16 fp32 values), so the rest only has to keep up. Rows are read one after another:
// values and indices are then two plain streams, which the hardware prefetches well; several rows side by side are
// eight short ones, and measured slower. Independent sums over steps of k hide the latency of the FMA; several tokens
// share the unpacked values and places.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "unrolled.h"

namespace sparsify { namespace {

// How far ahead of its use a line is asked for: past the end of the page, where the hardware's streams stop.
constexpr int64_t kPrefetchBytes = 4 << 10;

// T tokens, one row.
template <class V, DType type, int bits, int T>
void decode_nm_row(const NmWeight& w, const char* values, const float* x, const float* bias, float* y, int64_t row,
                   typename V::I group_start) {
  constexpr int64_t kSize = int64_t(byte_size(type));
  constexpr int64_t kColumns = 2 * V::kLanes;
  constexpr int kSteps = T <= 2 ? 4 : 2;
  const uint8_t* indices = w.indices + row * w.index_bytes_per_row();
  typename V::F sum[kSteps][T];
  unrolled<kSteps>([&](auto s) SPARSIFY_INLINE {
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[s][t] = V::zero(); });
  });

  int64_t k = 0, i = 0;  // column, kept value
  const auto step = [&](auto s) SPARSIFY_INLINE {
    prefetch(values + i * kSize + kPrefetchBytes);
    const typename V::F value = V::template load_values<type>(values + i * kSize);
    const typename V::I place = V::add(group_start, V::template positions<bits>(indices + i * bits / 8));
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      const float* at = x + t * w.cols + k;
      sum[s][t] = V::fma(value, V::select(V::load(at), place, V::load(at + V::kLanes)), sum[s][t]);
    });
    k += kColumns;
    i += V::kLanes;
  };
  prefetch(indices + kPrefetchBytes / 8);
  while (k + kSteps * kColumns <= w.cols) unrolled<kSteps>(step);
  while (k + kColumns <= w.cols) step(std::integral_constant<int, 0>());
  if (k < w.cols) {  // the same with the lanes behind the end 0
    const int64_t columns = w.cols - k;
    const typename V::F value = load_some_values<V, type>(values + i * kSize, columns / 2);
    const typename V::I place = V::add(group_start, load_some_positions<V, bits>(indices + i * bits / 8, columns / 2));
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      const char* at = reinterpret_cast<const char*>(x + t * w.cols + k);
      const typename V::F low = load_some_values<V, DType::f32>(at, columns);
      const typename V::F high = load_some_values<V, DType::f32>(at + V::kLanes * 4, columns - V::kLanes);
      sum[0][t] = V::fma(value, V::select(low, place, high), sum[0][t]);
    });
  }
  unrolled<T>([&](auto t) SPARSIFY_INLINE {
    typename V::F all = sum[0][t];
    unrolled<kSteps - 1>([&](auto s) SPARSIFY_INLINE { all = V::add(all, sum[s + 1][t]); });
    y[t * w.rows + row] = V::sum(all) + (bias ? bias[row] : 0.0f);
  });
}

template <class V>
bool can_decode_nm(const NmWeight& w) {
  return 2 * w.n == w.m && 2 * V::kLanes % w.m == 0;
}

// `type` is how the values are multiplied: as they are stored, or float32 where they are quantised.
template <class V, DType type, int bits>
void decode_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, int64_t row,
               int64_t row_last) {
  uint32_t start[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) start[i] = uint32_t(i / w.n * w.m);
  const typename V::I group_start = V::load(start);
  thread_local KeptScratch<float> room;
  float* unpacked = room.get(w.type == type ? 0 : w.kept_per_row());
  for (; row < row_last; ++row) {
    const char* values = w.type == type ? static_cast<const char*>(w.values) + row * w.value_bytes_per_row()
                                        : reinterpret_cast<const char*>(row_values<V>(w, row, unpacked));
    for (int64_t token = 0; token < tokens;) {  // the row stays in cache from one group of tokens to the next
      const float* from = x + token * w.cols;
      float* to = y + token * w.rows;
      switch (tokens - token) {
        case 1: decode_nm_row<V, type, bits, 1>(w, values, from, bias, to, row, group_start); token += 1; break;
        case 2: decode_nm_row<V, type, bits, 2>(w, values, from, bias, to, row, group_start); token += 2; break;
        case 3: decode_nm_row<V, type, bits, 3>(w, values, from, bias, to, row, group_start); token += 3; break;
        default: decode_nm_row<V, type, bits, 4>(w, values, from, bias, to, row, group_start); token += 4; break;
      }
    }
  }
}

}}  // namespace sparsify::
