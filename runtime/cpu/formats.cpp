#include "formats.h"

#include <cstdint>
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

std::string check_group(const NmWeight& w) {
  if (w.m < 2 || w.m > 32 || w.n < 1 || w.n > w.m)
    return "n:m must have 1 <= n <= m and 2 <= m <= 32, got " + number(w.n) + ":" + number(w.m);
  return "";
}

// Kernels keep column numbers in 32 bits. Rows without columns take no bytes, so that no file's size bounds them.
std::string check_size(const char* what, int64_t size) {
  if (size < 0 || size > INT32_MAX)
    return std::string(what) + " must be between 0 and " + number(INT32_MAX) + ", got " + number(size);
  return "";
}

bool aligned(const void* data, size_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

std::string check_scales(DType type, int64_t group, const void* data, const Shape* shape, int64_t rows, int64_t cols) {
  if (type != DType::i4 && group != 0) return "group is for 4-bit values only, got " + number(group);
  if (!is_quantised(type)) return shape ? "scales are for 8-bit and 4-bit values only, got " + show(*shape) : "";
  if (type == DType::i4 && group != 32 && group != 64 && group != 128)
    return "group must be 32, 64 or 128, got " + number(group);
  const Shape wanted = type == DType::i8 ? Shape{rows} : Shape{rows, (cols + group - 1) / group};
  if (!shape) return "quantised values need scales of shape " + show(wanted) + ", got none";
  if (*shape != wanted) return wanted_shape("scales", *shape, show(wanted));
  const int64_t count = type == DType::i8 ? rows : rows * wanted[1];
  if (count > 0 && !aligned(data, type == DType::i8 ? 4 : 2))
    return "scales must begin at a multiple of their element's size in memory";
  for (int64_t i = 0; i < count; ++i) {
    bool finite;
    if (type == DType::i8) {
      uint32_t bits;
      std::memcpy(&bits, static_cast<const char*>(data) + 4 * i, sizeof bits);
      finite = (bits & 0x7f800000) != 0x7f800000;
    } else {
      uint16_t bits;
      std::memcpy(&bits, static_cast<const char*>(data) + 2 * i, sizeof bits);
      finite = (bits & 0x7c00) != 0x7c00;
    }
    if (!finite) return "scales must be finite, got an infinity or NaN in row " + number(i / (count / rows));
  }
  return "";
}

std::string check_kept(DType type, int64_t row, int64_t kept) {
  if (is_quantised(type) && kept > kMostQuantised)
    return "a quantised row may keep at most " + number(kMostQuantised) + " values, got " + number(kept) + " in row " +
           number(row);
  return "";
}

// Bytes that hold two 2:4 groups, both ascending.
struct Ascending24 {
  bool byte[256] = {};
  constexpr Ascending24() {
    for (int first = 0; first < 16; ++first)
      for (int second = 0; second < 16; ++second)
        byte[first | second << 4] = (first & 3) < (first >> 2) && (second & 3) < (second >> 2);
  }
};
constexpr Ascending24 kAscending24;

// Positions must lie inside their group and ascend: what finds columns bit by bit would pair a weight with the wrong
// column otherwise.
std::string check_positions(const NmWeight& w) {
  const int bits = w.index_bits();
  const uint8_t* packed = w.indices;
  if (w.kept_per_row() == 0) return "";
  for (int64_t row = 0; row < w.rows; ++row, packed += w.index_bytes_per_row()) {
    int64_t i = 0;
    if (w.n == 2 && w.m == 4) {
      bool good = true;
      for (; i + 4 <= w.kept_per_row(); i += 4) good &= kAscending24.byte[packed[i / 4]];
      if (!good) i = 0;  // find it
    }
    for (int before = -1; i < w.kept_per_row(); ++i) {
      if (i % w.n == 0) before = -1;
      const int position = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
      const auto where = [&] { return "in row " + number(row) + " at value " + number(i); };
      if (position >= w.m) return "indices must be below m = " + number(w.m) + ", got " + number(position) + " " + where();
      if (position <= before)
        return "indices must ascend inside a group, got " + number(position) + " after " + number(before) + " " + where();
      before = position;
    }
    const int64_t left = w.kept_per_row() * bits % 8;
    if (left && packed[w.index_bytes_per_row() - 1] >> left)
      return "indices have bits set behind the last one in row " + number(row) + ", padding bits must be 0";
  }
  return "";
}

}  // namespace

std::string show(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + number(shape[i]);
  return text + "]";
}

std::string check_nm_sizes(const NmWeight& w, const Shape* scales) {
  std::string why = check_group(w);
  if (why.empty()) why = check_size("in_features", w.cols);
  if (why.empty()) why = check_size("out_features", w.rows);
  if (!why.empty()) return why;
  if (w.cols % w.m != 0)
    return "in_features must be a multiple of m = " + number(w.m) + ", got " + number(w.cols);
  if (!(why = check_kept(w.type, 0, w.kept_per_row())).empty()) return why;
  return check_scales(w.type, w.group, w.scales, scales, w.rows, w.cols);
}

std::string check_nm(NmWeight& w, const Shape& values, const Shape& indices, const Shape* scales, const Shape* bias) {
  std::string why = check_group(w);
  if (!why.empty()) return why;
  const bool pairs = w.type == DType::i4;
  if (values.size() != 2) return wanted_shape("values", values, pairs ? "[N, ceil(K * n / m / 2)]" : "[N, K * n / m]");
  if (!pairs && values[1] % w.n != 0)
    return "values must hold whole groups of n = " + number(w.n) + " a row, got shape " + show(values);
  w.rows = values[0];
  if (!pairs) w.cols = values[1] / w.n > INT32_MAX ? int64_t{INT32_MAX} + 1 : values[1] / w.n * w.m;
  if (!(why = check_nm_sizes(w, scales)).empty()) return why;
  const Shape wanted_values = {w.rows, pairs ? w.value_bytes_per_row() : w.kept_per_row()};
  if (values != wanted_values)
    return wanted_shape("values", values, show(wanted_values)) + " (in_features " + number(w.cols) + ")";
  const Shape wanted = {w.rows, w.index_bytes_per_row()};
  if (indices != wanted)
    return wanted_shape("indices", indices, show(wanted)) + " (values " + show(values) + ", " +
           number(w.index_bits()) + " bits an index)";
  if (!(why = check_bias(bias, w.rows)).empty()) return why;
  return check_positions(w);
}

std::string check_bitmask_sizes(const BitmaskWeight& w, const Shape* scales) {
  std::string why = check_size("in_features", w.cols);
  if (why.empty()) why = check_size("out_features", w.rows);
  return why.empty() ? check_scales(w.type, w.group, w.scales, scales, w.rows, w.cols) : why;
}

std::string check_bitmask(BitmaskWeight& w, const Shape& values, const Shape& mask, const Shape& row_start,
                          const Shape* scales, const Shape* bias) {
  std::string why = check_size("in_features", w.cols);
  if (!why.empty()) return why;
  if (mask.size() != 2) return wanted_shape("mask", mask, "[N, ceil(K / 8)]");
  const int64_t mask_bytes = w.mask_bytes_per_row();
  if (mask[1] != mask_bytes)
    return "mask must have " + number(mask_bytes) + " bytes a row for K = " + number(w.cols) + ", got " +
           number(mask[1]);
  if (values.size() != 1) return wanted_shape("values", values, w.type == DType::i4 ? "[bytes]" : "[nnz]");
  w.rows = mask[0];
  if (row_start != Shape{w.rows + 1})
    return wanted_shape("row_start", row_start, show({w.rows + 1})) + " (one more than the rows of mask)";
  if (!(why = check_bias(bias, w.rows)).empty()) return why;
  if (!(why = check_bitmask_sizes(w, scales)).empty()) return why;
  if (!aligned(w.row_start, 8)) return "row_start must begin at a multiple of 8 bytes in memory";
  if (w.row_start[0] != 0) return "row_start must begin with 0, got " + number(w.row_start[0]);
  const uint8_t* mask_row = w.mask;
  for (int64_t row = 0; row < w.rows; ++row, mask_row += mask_bytes) {
    if (w.cols % 8 != 0 && mask_row[mask_bytes - 1] >> (w.cols % 8) != 0)
      return "mask has bits set behind column K = " + number(w.cols) + " in row " + number(row) +
             ", padding bits must be 0";
    int64_t kept = 0, stored = 0;
    for (int64_t byte = 0; byte < mask_bytes; byte += kNibbleColumns / 8) {
      const int64_t left = mask_bytes - byte;
      const int64_t set = bits_set(mask_row + byte, left < kNibbleColumns / 8 ? left : kNibbleColumns / 8);
      kept += set;
      stored += w.type == DType::i4 ? stored_bytes(w.type, set) : set;
      // A mask that lost or gained a bit would often need as many bytes as before.
      const int64_t last = w.row_start[row] + stored - 1;
      if (w.type == DType::i4 && set % 2 && last < values[0] && static_cast<const uint8_t*>(w.values)[last] >> 4)
        return "the half of a byte behind an odd number of int4 values must be 0, got another in row " + number(row);
    }
    if (!(why = check_kept(w.type, row, kept)).empty()) return why;
    const int64_t wanted = w.row_start[row] + stored;  // cannot overflow: row_start[row] was checked just before
    if (w.row_start[row + 1] != wanted)
      return "row_start[" + number(row + 1) + "] must be " + number(wanted) + " (row_start[" + number(row) + "] + " +
             number(stored) + " for " + number(kept) + " bits set in the mask), got " +
             number(w.row_start[row + 1]);
  }
  if (w.row_start[w.rows] != values[0])
    return "row_start must end with the number of values " + number(values[0]) + ", got " +
           number(w.row_start[w.rows]);
  return "";
}

std::string check_x(const Shape& x, int64_t cols) {
  if (x.empty() || x.back() != cols) return wanted_shape("x", x, "[..., " + number(cols) + "] to match the weight");
  return "";
}

}  // namespace sparsify
