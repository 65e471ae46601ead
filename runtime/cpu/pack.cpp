#include "pack.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kept_row.h"
#include "quantise.h"

namespace sparsify {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// By its bits: a comparison may take the smallest numbers for zero, if the calling thread is set so.
bool is_zero(float value) { return bits_of(value) << 1 == 0; }

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// Calls pack_row(row) for every row; returns the sentence of the first row that has one.
template <class Row>
std::string for_rows(int64_t rows, int64_t cols, const Parallel& parallel, const Row& pack_row) {
  const int64_t per_task = (1 << 16) / (cols + 1) + 1;
  const int64_t tasks = (rows + per_task - 1) / per_task;
  std::vector<std::string> why(static_cast<size_t>(tasks));
  auto task = [&](int64_t index) {
    const int64_t last = (index + 1) * per_task < rows ? (index + 1) * per_task : rows;
    for (int64_t row = index * per_task; row < last && why[size_t(index)].empty(); ++row)
      why[size_t(index)] = pack_row(row);
  };
  parallel_for(parallel, tasks, task);
  for (const std::string& sentence : why)
    if (!sentence.empty()) return sentence;
  return "";
}

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t half = magnitude > 0x7f800000 ? 0x7fc0 : rounded;
  return uint16_t(half & 0x7fff ? half : 0);
}

uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  // The exponent moves from 127 to 15 and 13 bits are rounded away; too large ends in infinity.
  uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  normal = normal > 0x7c00 ? 0x7c00 : normal;
  // Below 2^-14 the last bit is worth 2^-24, as it is in a float32 next to 0.5.
  const uint32_t small = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? small : normal;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(half ? half | (bits >> 16 & 0x8000) : 0);
}

// False if a finite number became infinite.
template <DType type>
bool store_halves(const float* from, int64_t count, void* to) {
  uint16_t* out = static_cast<uint16_t*>(to);
  uint32_t lost = 0;
  constexpr uint32_t kInfinity = type == DType::f16 ? 0x7c00 : 0x7f80;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = type == DType::f16 ? to_f16(from[i]) : to_bf16(from[i]);
    std::memcpy(out + i, &half, sizeof half);
    lost |= uint32_t((half & 0x7fff) == kInfinity) & uint32_t((bits_of(from[i]) & 0x7fffffff) < 0x7f800000);
  }
  return !lost;
}

int32_t code_of(float ratio, float most) {
  ratio = ratio < -most ? -most : ratio;
  return nearest(ratio > most ? most : ratio);
}

// The kept weights of a row (of a quantised row: over their scales) as they are stored. False if one does not fit.
bool store_values(DType type, const float* from, int64_t count, void* to) {
  switch (type) {
    case DType::f32:
      for (int64_t i = 0; i < count; ++i) {
        const float value = from[i] + 0.0f;  // -0.0 becomes +0.0
        std::memcpy(static_cast<char*>(to) + 4 * i, &value, sizeof value);
      }
      return true;
    case DType::f16: return store_halves<DType::f16>(from, count, to);
    case DType::bf16: return store_halves<DType::bf16>(from, count, to);
    case DType::i8:
      for (int64_t i = 0; i < count; ++i) static_cast<int8_t*>(to)[i] = int8_t(code_of(from[i], 127.0f));
      return true;
    case DType::i4:
      uint8_t* byte = static_cast<uint8_t*>(to);
      int64_t i = 0;
      for (; i + 2 <= count; i += 2)
        *byte++ = uint8_t((code_of(from[i], 7.0f) + 8) | (code_of(from[i + 1], 7.0f) + 8) << 4);
      if (i < count) *byte = uint8_t(code_of(from[i], 7.0f) + 8);
      return true;
  }
  return true;
}

std::string does_not_fit(DType type, const float* from, int64_t count) {
  const bool f16 = type == DType::f16;
  for (int64_t i = 0; i < count; ++i)
    if (std::isfinite(from[i]) && ((f16 ? to_f16(from[i]) : to_bf16(from[i])) & 0x7fff) == (f16 ? 0x7c00 : 0x7f80))
      return number(from[i]) + " does not fit " +
             (f16 ? "float16, which ends at 65504" : "bfloat16, which ends at 3.38953e+38");
  return "";
}

std::string not_finite(const float* row, int64_t cols, int64_t index) {
  if (largest_magnitude(row, cols) < kInfinityBits) return "";
  return "a weight in row " + std::to_string(index) + " is infinite or NaN and cannot be quantised";
}

// The scales of a row to divide by: what is divided by infinity has code 0.
template <class Weight>
RowScales row_divisors(const Weight& w, int64_t row) {
  RowScales divisors = row_scales(w, row);
  for (float& scale : divisors.values) scale = is_zero(scale) ? float_from_bits(kInfinityBits) : scale;
  return divisors;
}

uint32_t nonzeros(const float* weights, int count) {
  uint32_t found = 0;
  for (int i = 0; i < count; ++i) found |= uint32_t(!is_zero(weights[i])) << i;
  return found;
}

int bits_set(uint32_t bits) {
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
}

// Lists the kept weights of a row and packs their positions. False if a group has more than n. kM is m, 0 any.
template <int kM, bool kQuantised>
bool list_nm_row(const float* dense, const NmWeight& w, const RowScales& divisors, float* kept, uint8_t* indices) {
  const int m = kM ? kM : w.m, bits = w.index_bits();
  uint32_t byte = 0;
  int filled = 0;
  for (int64_t first = 0; first < w.cols; first += m) {
    const float* group = dense + first;
    uint32_t places = nonzeros(group, m);
    int free = w.n - bits_set(places);
    if (free < 0) return false;
    for (; free > 0; --free) places |= places + 1;  // spare slots: the lowest positions not in use
    for (; places; places &= places - 1) {
      const int position = __builtin_ctz(places);
      *kept++ = kQuantised ? group[position] / divisors.at(first + position) : group[position];
      byte |= uint32_t(position) << filled;
      filled += bits;
      if (filled == 8) {
        *indices++ = uint8_t(byte);
        byte = 0;
        filled = 0;
      }
    }
  }
  if (filled) *indices = uint8_t(byte);
  return true;
}

template <bool kQuantised>
bool list_nm(const float* dense, const NmWeight& w, const RowScales& divisors, float* kept, uint8_t* indices) {
  if (w.m == 4) return list_nm_row<4, kQuantised>(dense, w, divisors, kept, indices);
  return list_nm_row<0, kQuantised>(dense, w, divisors, kept, indices);
}

std::string too_many(const float* dense, const NmWeight& w) {
  int most = 0;
  for (int64_t first = 0; first < w.cols; first += w.m) {
    const int count = bits_set(nonzeros(dense + first, w.m));
    most = count > most ? count : most;
  }
  return "a group of " + std::to_string(w.m) + " holds " + std::to_string(most) + " non-zeros, at most " +
         std::to_string(w.n) + " can be packed as " + std::to_string(w.n) + ":" + std::to_string(w.m);
}

template <class Weight>
void unpack(const Weight& w, float* dense, const Parallel& parallel) {
  if (w.cols == 0) return;  // rows without bytes, as many as a shape may claim
  for_rows(w.rows, w.cols, parallel, [&](int64_t row) -> std::string {
    float* to = dense + row * w.cols;
    for (int64_t k = 0; k < w.cols; ++k) to[k] = 0.0f;
    KeptRow kept;
    unpack_row(w, row, kept);
    const RowScales scales = row_scales(w, row);
    for (size_t i = 0; i < kept.weight.size(); ++i) {
      const int64_t column = kept.column[i];
      to[column] = is_quantised(w.type) ? kept.weight[i] * scales.at(column) : kept.weight[i];
    }
    return "";
  });
}

}  // namespace

std::string find_scales(const float* dense, int64_t rows, int64_t cols, DType type, int64_t group, void* scales,
                        const Parallel& parallel) {
  const int64_t width = type == DType::i8 ? cols : group;
  const int64_t groups = type == DType::i8 ? 1 : (cols + group - 1) / group;
  if (groups == 0) return "";
  return for_rows(rows, cols, parallel, [&](int64_t row) -> std::string {
    for (int64_t i = 0; i < groups; ++i) {
      const float* first = dense + row * cols + i * width;
      const int32_t bits = largest_magnitude(first, (i + 1) * width < cols ? width : cols - i * width);
      if (bits >= kInfinityBits) return not_finite(dense + row * cols, cols, row);
      const float largest = float_from_bits(uint32_t(bits));
      if (type == DType::i8) {
        const float scale = largest / 127.0f;
        static_cast<float*>(scales)[row] = bits && is_zero(scale) ? float_from_bits(1) : scale;
      } else {
        const uint16_t scale = to_f16(largest / 7.0f);
        if (scale >= 0x7c00)
          return number(largest) + " in row " + std::to_string(row) +
                 " is too large for int4: a seventh of it, the scale, does not fit float16";
        static_cast<uint16_t*>(scales)[row * groups + i] = bits && !scale ? 1 : scale;
      }
    }
    return "";
  });
}

std::string pack_nm(const float* dense, const NmWeight& w, void* values, uint8_t* indices, const Parallel& parallel) {
  if (w.cols == 0) return "";
  return for_rows(w.rows, w.cols, parallel, [&](int64_t row) -> std::string {
    const float* from = dense + row * w.cols;
    std::vector<float> kept(static_cast<size_t>(w.kept_per_row()));
    uint8_t* to = indices + row * w.index_bytes_per_row();
    if (is_quantised(w.type)) {
      const std::string why = not_finite(from, w.cols, row);
      if (!why.empty()) return why;
      if (!list_nm<true>(from, w, row_divisors(w, row), kept.data(), to)) return too_many(from, w);
    } else if (!list_nm<false>(from, w, {}, kept.data(), to)) {
      return too_many(from, w);
    }
    char* stored = static_cast<char*>(values) + row * w.value_bytes_per_row();
    return store_values(w.type, kept.data(), w.kept_per_row(), stored)
               ? ""
               : does_not_fit(w.type, kept.data(), w.kept_per_row());
  });
}

void find_mask(const float* dense, int64_t rows, int64_t cols, DType type, uint8_t* mask, int64_t* row_start,
               const Parallel& parallel) {
  const int64_t mask_bytes = (cols + 7) / 8;
  for_rows(rows, cols, parallel, [&](int64_t row) -> std::string {
    const float* from = dense + row * cols;
    uint8_t* to = mask + row * mask_bytes;
    int64_t stored = 0;
    for (int64_t chunk = 0; chunk < cols; chunk += kNibbleColumns) {
      int64_t kept = 0;
      const int64_t last = chunk + kNibbleColumns < cols ? chunk + kNibbleColumns : cols;
      for (int64_t k = chunk; k < last; k += 8) {
        const uint32_t byte = last - k >= 8 ? nonzeros(from + k, 8) : nonzeros(from + k, int(last - k));
        to[k / 8] = uint8_t(byte);
        kept += bits_set(byte);
      }
      stored += type == DType::i4 ? stored_bytes(type, kept) : kept;
    }
    row_start[row + 1] = stored;
    return "";
  });
  row_start[0] = 0;
  for (int64_t row = 0; row < rows; ++row) row_start[row + 1] += row_start[row];
}

std::string pack_bitmask(const float* dense, const BitmaskWeight& w, void* values, const Parallel& parallel) {
  return for_rows(w.rows, w.cols, parallel, [&](int64_t row) -> std::string {
    const float* from = dense + row * w.cols;
    const bool quantised = is_quantised(w.type);
    if (quantised) {
      const std::string why = not_finite(from, w.cols, row);
      if (!why.empty()) return why;
    }
    const RowScales divisors = row_divisors(w, row);
    const uint8_t* mask = w.mask + row * w.mask_bytes_per_row();
    char* to = static_cast<char*>(values) + w.row_start[row] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
    for (int64_t chunk = 0; chunk < w.cols; chunk += kNibbleColumns) {
      float kept[kNibbleColumns];
      int64_t count = 0;
      for (int64_t k = chunk; k < chunk + kNibbleColumns && k < w.cols; k += 8)
        for (uint32_t bits = mask[k / 8]; bits; bits &= bits - 1) {
          const int64_t column = k + __builtin_ctz(bits);
          kept[count++] = quantised ? from[column] / divisors.at(column) : from[column];
        }
      if (!store_values(w.type, kept, count, to)) return does_not_fit(w.type, kept, count);
      to += stored_bytes(w.type, count);
    }
    return "";
  });
}

void unpack_nm(const NmWeight& w, float* dense, const Parallel& parallel) { unpack(w, dense, parallel); }

void unpack_bitmask(const BitmaskWeight& w, float* dense, const Parallel& parallel) { unpack(w, dense, parallel); }

}  // namespace sparsify
