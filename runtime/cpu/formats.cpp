#include "formats.h"

#include <cstring>

namespace sparsify {
namespace {

std::string number(int64_t value) { return std::to_string(value); }

std::string wanted_shape(const char* what, const Shape& got, const std::string& wanted) {
  return std::string(what) + " must have shape " + wanted + ", got " + show(got);
}

int64_t bits_set(const uint8_t* bytes, int64_t count) {
  int64_t set = 0;
  for (; count > 0; bytes += 8, count -= 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, size_t(count < 8 ? count : 8));
    // Adds neighbouring 1, 2 and 4 bit fields, then all bytes: this file is compiled without the popcnt instruction.
    word -= word >> 1 & 0x5555555555555555;
    word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
    set += int64_t(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
  }
  return set;
}

std::string check_bias(const Shape* bias, int64_t rows) {
  if (bias && *bias != Shape{rows}) return wanted_shape("bias", *bias, show({rows}));
  return "";
}

std::string check_index_range(const NmWeight& w) {
  const int bits = w.index_bits();
  if (1 << bits == w.m) return "";  // every code is a legal position
  const uint8_t* packed = w.indices;
  for (int64_t row = 0; row < w.rows; ++row, packed += w.index_bytes_per_row())
    for (int64_t i = 0; i < w.kept_per_row(); ++i) {
      const int position = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
      if (position >= w.m)
        return "indices must be below m = " + number(w.m) + ", got " + number(position) + " in row " + number(row) +
               " at value " + number(i);
    }
  return "";
}

}  // namespace

std::string show(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + number(shape[i]);
  return text + "]";
}

std::string check_nm(NmWeight& w, const Shape& values, const Shape& indices, const Shape* bias) {
  if (w.m < 2 || w.m > 32 || w.n < 1 || w.n > w.m)
    return "n:m must have 1 <= n <= m and 2 <= m <= 32, got " + number(w.n) + ":" + number(w.m);
  if (values.size() != 2) return wanted_shape("values", values, "[N, K * n / m]");
  if (values[1] % w.n != 0)
    return "values must hold whole groups of n = " + number(w.n) + " a row, got shape " + show(values);
  w.rows = values[0];
  w.cols = values[1] / w.n * w.m;
  const Shape wanted = {w.rows, w.index_bytes_per_row()};
  if (indices != wanted)
    return wanted_shape("indices", indices, show(wanted)) + " (values " + show(values) + ", " +
           number(w.index_bits()) + " bits an index)";
  const std::string why = check_bias(bias, w.rows);
  return why.empty() ? check_index_range(w) : why;
}

std::string check_mask_cols(int64_t cols, int64_t mask_bytes, uint8_t last_byte_bits) {
  if ((cols + 7) / 8 != mask_bytes)
    return "mask must have " + number((cols + 7) / 8) + " bytes a row for K = " + number(cols) + ", got " +
           number(mask_bytes);
  if (cols % 8 != 0 && last_byte_bits >> (cols % 8) != 0)
    return "mask has bits set behind column K = " + number(cols) + ", padding bits must be 0";
  return "";
}

uint8_t last_byte_bits(const BitmaskWeight& w, int64_t mask_bytes) {
  uint8_t bits = 0;
  for (int64_t row = 0; mask_bytes > 0 && row < w.rows; ++row) bits |= w.mask[(row + 1) * mask_bytes - 1];
  return bits;
}

std::string check_bitmask(BitmaskWeight& w, const Shape& values, const Shape& mask, const Shape& row_start,
                          const Shape* bias) {
  if (mask.size() != 2) return wanted_shape("mask", mask, "[N, ceil(K / 8)]");
  if (values.size() != 1) return wanted_shape("values", values, "[nnz]");
  w.rows = mask[0];
  const int64_t mask_bytes = mask[1];
  if (row_start != Shape{w.rows + 1})
    return wanted_shape("row_start", row_start, show({w.rows + 1})) + " (one more than the rows of mask)";
  const std::string why = check_bias(bias, w.rows);
  if (!why.empty()) return why;
  if (w.row_start[0] != 0) return "row_start must begin with 0, got " + number(w.row_start[0]);
  const uint8_t* byte = w.mask;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t kept = bits_set(byte, mask_bytes);
    byte += mask_bytes;
    const int64_t wanted = w.row_start[row] + kept;  // cannot overflow: row_start[row] was checked just before
    if (w.row_start[row + 1] != wanted)
      return "row_start[" + number(row + 1) + "] must be " + number(wanted) + " (row_start[" + number(row) + "] + " +
             number(kept) + " bits set in the mask), got " + number(w.row_start[row + 1]);
  }
  if (w.row_start[w.rows] != values[0])
    return "row_start must end with the number of values " + number(values[0]) + ", got " +
           number(w.row_start[w.rows]);
  return w.cols < 0 ? "" : check_mask_cols(w.cols, mask_bytes, last_byte_bits(w, mask_bytes));
}

std::string check_x(const Shape& x, int64_t cols) {
  if (x.empty() || x.back() != cols) return wanted_shape("x", x, "[..., " + number(cols) + "] to match the weight");
  return "";
}

}  // namespace sparsify
