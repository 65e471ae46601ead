// One row of a weight, unpacked one value at a time: what the portable kernels and unpacking (pack.h) read.
#pragma once
#include <vector>

#include "half.h"
#include "kernels.h"

namespace sparsify { namespace {

// One row of W, unpacked: weight[i] belongs to column[i], ascending. Of a quantised row, weight[i] is an integer code.
struct KeptRow {
  std::vector<float> weight;
  std::vector<int64_t> column;

  void clear() {
    weight.clear();
    column.clear();
  }
};

// Value number `index`, counted from `first`: an element of `values`, for i4 a byte of it.
[[maybe_unused]] float weight_at(const void* values, DType type, int64_t first, int64_t index) {
  if (!is_quantised(type)) return value_at(values, type, first + index);
  if (type == DType::i8) return static_cast<const int8_t*>(values)[first + index];
  const uint8_t pair = static_cast<const uint8_t*>(values)[first + index / 2];
  return float((index % 2 ? pair >> 4 : pair & 15) - 8);
}

[[maybe_unused]] void unpack_row(const NmWeight& w, int64_t row, KeptRow& kept) {
  const int bits = w.index_bits();
  const uint8_t* packed = w.indices + row * w.index_bytes_per_row();
  const int64_t first = row * (w.type == DType::i4 ? w.value_bytes_per_row() : w.kept_per_row());
  for (int64_t i = 0; i < w.kept_per_row(); ++i) {
    const int position = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
    kept.weight.push_back(weight_at(w.values, w.type, first, i));
    kept.column.push_back(i / w.n * w.m + position);
  }
}

[[maybe_unused]] void unpack_row(const BitmaskWeight& w, int64_t row, KeptRow& kept) {
  const uint8_t* mask = w.mask + row * w.mask_bytes_per_row();
  int64_t first = w.row_start[row];
  int64_t next = 0;
  for (int64_t k = 0; k < w.cols; ++k) {
    if (w.type == DType::i4 && k % kNibbleColumns == 0) {  // begin on a byte
      first += (next + 1) / 2;
      next = 0;
    }
    if (!(mask[k / 8] >> (k % 8) & 1)) continue;
    kept.weight.push_back(weight_at(w.values, w.type, first, next++));
    kept.column.push_back(k);
  }
}

// The scales of a row as float32, one for every group of columns. Empty for float types.
struct RowScales {
  std::vector<float> values;
  int shift = 63;  // i8: one group

  int64_t group(int64_t column) const { return column >> shift; }
  float at(int64_t column) const { return values[size_t(column >> shift)]; }
};

template <class Weight>
RowScales row_scales(const Weight& w, int64_t row) {
  RowScales scales;
  if (w.type == DType::i8) scales.values = {static_cast<const float*>(w.scales)[row]};
  if (w.type != DType::i4) return scales;
  scales.shift = w.group == 32 ? 5 : w.group == 64 ? 6 : 7;
  const int64_t groups = (w.cols + w.group - 1) / w.group;
  for (int64_t i = 0; i < groups; ++i)
    scales.values.push_back(f16_to_float(static_cast<const uint16_t*>(w.scales)[row * groups + i]));
  return scales;
}

}}  // namespace sparsify::
