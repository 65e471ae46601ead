// What the kernels read where the stored form is not yet what they multiply with: values as float32, N:M positions as
// mask bits. Both are made once for a few rows and used for many tokens, or in place where they are that already.
#pragma once
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "unrolled.h"

namespace sparsify { namespace {

// Into the level 2 cache.
SPARSIFY_INLINE inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The first `count` values at p, the other lanes 0; reads nothing behind them.
template <class V, DType type>
typename V::F load_some_values(const char* p, int64_t count) {
  if (count >= V::kLanes) return V::template load_values<type>(p);
  char local[V::kLanes * 4] = {};
  if (count > 0) std::memcpy(local, p, size_t(count) * byte_size(type));
  return V::template load_values<type>(local);
}

template <class V, int bits>
typename V::I load_some_positions(const uint8_t* p, int64_t count) {
  if (count >= V::kLanes) return V::template positions<bits>(p);
  uint8_t local[V::kLanes] = {};
  if (count > 0) std::memcpy(local, p, size_t(count * bits + 7) / 8);
  return V::template positions<bits>(local);
}

template <class V, DType type>
void to_float(const char* from, int64_t count, float scale, float* to) {
  const typename V::F factor = V::broadcast(scale);
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes)
    V::store(to + i, V::mul(V::template load_values<type>(from + i * int64_t(byte_size(type))), factor));
  float last[V::kLanes];
  V::store(last, V::mul(load_some_values<V, type>(from + i * int64_t(byte_size(type)), count - i), factor));
  std::memcpy(to + i, last, size_t(count - i) * sizeof(float));
}

// 4-bit values first .. first + count of `from`.
inline void nibbles_to_float(const uint8_t* from, int64_t first, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = first + i;
    to[i] = float((from[at / 2] >> (at % 2 * 4) & 15) - 8) * scale;
  }
}

inline float group_scale(const void* scales, int64_t index) { return value_at(scales, DType::f16, index); }

inline uint64_t load_bits(const uint8_t* bytes, int64_t count) {  // count bytes, at most 8
  uint64_t word = 0;
  std::memcpy(&word, bytes, size_t(count));
  return word;
}

inline int64_t kept_in_row(const NmWeight& w, int64_t) { return w.kept_per_row(); }
inline int64_t kept_in_row(const BitmaskWeight& w, int64_t row) { return w.row_start[row + 1] - w.row_start[row]; }

inline int nm_position(const uint8_t* indices, int bits, int64_t i) {
  return indices[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
}

// `kept` values at `from`, of any type but i4.
template <class V, class Weight>
const float* row_floats(const Weight& w, int64_t row, const char* from, int64_t kept, float* room) {
  switch (w.type) {
    case DType::f16: to_float<V, DType::f16>(from, kept, 1.0f, room); return room;
    case DType::bf16: to_float<V, DType::bf16>(from, kept, 1.0f, room); return room;
    case DType::i8: to_float<V, DType::i8>(from, kept, static_cast<const float*>(w.scales)[row], room); return room;
    default: return reinterpret_cast<const float*>(from);
  }
}

// Row `row` of W, its kept values as float32: in place, or in `room` [kept_per_row].
template <class V>
const float* row_values(const NmWeight& w, int64_t row, float* room) {
  const int64_t kept = w.kept_per_row();
  const char* from = static_cast<const char*>(w.values) + row * w.value_bytes_per_row();
  if (w.type != DType::i4) return row_floats<V>(w, row, from, kept, room);
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(from);
  const int64_t groups = (w.cols + w.group - 1) / w.group;
  if (w.group % w.m == 0) {  // whole groups of m under each scale
    const int64_t each = w.group / w.m * w.n;
    for (int64_t i = 0, g = 0; i < kept; i += each, ++g)
      nibbles_to_float(codes, i, kept - i < each ? kept - i : each, group_scale(w.scales, row * groups + g), room + i);
    return room;
  }
  const uint8_t* indices = w.indices + row * w.index_bytes_per_row();
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t column = i / w.n * w.m + nm_position(indices, w.index_bits(), i);
    nibbles_to_float(codes, i, 1, group_scale(w.scales, row * groups + column / w.group), room + i);
  }
  return room;
}

template <class V>
const float* row_values(const BitmaskWeight& w, int64_t row, float* room) {
  const int64_t begin = w.row_start[row], kept = w.row_start[row + 1] - begin;
  const char* from = static_cast<const char*>(w.values) + (w.type == DType::i4 ? begin : begin * int64_t(byte_size(w.type)));
  if (w.type != DType::i4) return row_floats<V>(w, row, from, kept, room);
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(from);
  const uint8_t* mask = w.mask + row * w.mask_bytes_per_row();
  const int64_t groups = (w.cols + w.group - 1) / w.group;
  float* to = room;
  for (int64_t k = 0; k < w.cols; k += kNibbleColumns) {
    const int64_t bytes = w.mask_bytes_per_row() - k / 8;
    const uint64_t word = load_bits(mask + k / 8, bytes < 8 ? bytes : 8);
    const int low = __builtin_popcount(uint32_t(word)), high = __builtin_popcount(uint32_t(word >> 32));
    nibbles_to_float(codes, 0, low, group_scale(w.scales, row * groups + k / w.group), to);
    if (high) nibbles_to_float(codes, low, high, group_scale(w.scales, row * groups + (k + 32) / w.group), to + low);
    codes += (low + high + 1) / 2;
    to += low + high;
  }
  return room;
}

constexpr int64_t kWordColumns = 64;
[[maybe_unused]] int64_t mask_words(int64_t cols) { return (cols + kWordColumns - 1) / kWordColumns; }

// The kept columns of a row as bits, 64 to a word; the bits behind the last column are 0.
[[maybe_unused]] void row_mask(const BitmaskWeight& w, int64_t row, uint64_t* words) {
  const int64_t bytes = w.mask_bytes_per_row();
  if (bytes % 8) words[bytes / 8] = 0;
  std::memcpy(words, w.mask + row * bytes, size_t(bytes));
}

[[maybe_unused]] void row_mask(const NmWeight& w, int64_t row, uint64_t* words) {
  std::memset(words, 0, size_t(mask_words(w.cols)) * 8);
  const uint8_t* indices = w.indices + row * w.index_bytes_per_row();
  const int bits = w.index_bits();
  for (int64_t i = 0, start = 0; start < w.cols; start += w.m)
    for (int slot = 0; slot < w.n; ++slot, ++i) {
      const int64_t column = start + nm_position(indices, bits, i);
      words[column / kWordColumns] |= uint64_t(1) << (column % kWordColumns);
    }
}

}}  // namespace sparsify::
