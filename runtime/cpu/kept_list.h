// Unpacking: part of a row of W as two plain lists, what both prefill (tile.h) and the general decode path read.
//
//   weight[i]  float32
//   offset[i]  column * stride, the place of that column's activations
//
// Done once for many tokens. 16 indices are unpacked with one shift by a different amount in each lane; a bitmask
// with one compress of the column numbers (its values already lie in order).
#pragma once
#include <cstring>

#include "kernels.h"
#include "unrolled.h"

namespace sparsify { namespace {

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

// Into the level 2 cache.
SPARSIFY_INLINE inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// How many rows ahead to prefetch when a few rows are read side by side, which the hardware follows badly: rows are
// short and the next ones begin elsewhere. About 24 KiB hides the latency of memory. Behind the end of a task it
// fetches what the next task needs into the shared level 3 cache; behind the end of the array it does nothing.
[[maybe_unused]] int64_t rows_to_prefetch(int64_t row_bytes) { return ((24 << 10) / (row_bytes + 1) + 4) / 4 * 4; }

// Where in a row to begin, and where in its values.
struct Cursor {
  int64_t value;
};

// Walks N:M rows. `base[i]` = (i / n) * m * stride is the same for every row and made once.
template <class V, DType type, int bits>
struct NmUnpacker {
  const NmWeight& w;
  const uint32_t* base;
  uint32_t stride;

  Cursor begin(int64_t) const { return {0}; }

  // Values first .. first + count of `row`; first is a multiple of kLanes. Lists need room for kLanes more.
  int64_t unpack(int64_t row, int64_t first, int64_t count, Cursor&, float* weight, uint32_t* offset) const {
    constexpr int64_t kSize = int64_t(byte_size(type));
    const char* values = static_cast<const char*>(w.values) + (row * w.kept_per_row() + first) * kSize;
    const uint8_t* indices = w.indices + row * w.index_bytes_per_row() + first * bits / 8;
    const typename V::I scale = V::broadcast(stride);
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) {
      const char* from = values + i * kSize;
      prefetch(from + count * kSize);  // the row's next block: the jump from row to row hides it otherwise
      V::store(weight + i, V::template load_values<type>(from));
      V::store(offset + i, V::add(V::load(base + first + i), V::mul(V::template positions<bits>(indices + i * bits / 8), scale)));
    }
    if (i < count) {
      V::store(weight + i, load_some_values<V, type>(values + i * kSize, count - i));
      const typename V::I position = load_some_positions<V, bits>(indices + i * bits / 8, count - i);
      V::store(offset + i, V::add(V::load(base + first + i), V::mul(position, scale)));
    }
    return count;
  }
};

// Walks bitmask rows; here first and count are columns.
template <class V, DType type>
struct BitmaskUnpacker {
  const BitmaskWeight& w;
  const uint32_t* base;  // base[k] = k * stride
  uint32_t stride;

  Cursor begin(int64_t row) const { return {w.row_start[row]}; }

  int64_t unpack(int64_t row, int64_t first, int64_t count, Cursor& at, float* weight, uint32_t* offset) const {
    const uint8_t* mask = w.mask + row * w.mask_bytes_per_row() + first / 8;
    int64_t kept = 0;
    int64_t k = 0;
    const auto take = [&](uint32_t bits) SPARSIFY_INLINE {
      V::compress(offset + kept, bits, V::load(base + first + k));
      kept += __builtin_popcount(bits);
    };
    for (; k + V::kLanes <= count; k += V::kLanes) take(V::mask_bits(mask + k / 8));
    if (k < count) {
      uint8_t last[2] = {};
      std::memcpy(last, mask + k / 8, size_t(count - k + 7) / 8);
      take(V::mask_bits(last));
    }
    constexpr int64_t kSize = int64_t(byte_size(type));
    const char* values = static_cast<const char*>(w.values) + at.value * kSize;
    const bool may_overread = at.value + kept + V::kLanes <= w.row_start[w.rows];
    int64_t i = 0;
    for (; i + V::kLanes <= kept || (may_overread && i < kept); i += V::kLanes) {
      prefetch(values + (i + kept) * kSize);
      V::store(weight + i, V::template load_values<type>(values + i * kSize));
    }
    if (i < kept) V::store(weight + i, load_some_values<V, type>(values + i * kSize, kept - i));
    at.value += kept;
    return kept;
  }
};

}}  // namespace sparsify::
