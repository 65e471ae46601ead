// The weights as tiles: rows of W whose kept values are put where their columns are, zeros elsewhere.
//
//   step     64 bytes of each row: 32 columns in bfloat16, 64 in 8 bits
//   layout   [step][part][2 tiles][16 rows][64 bytes]          32 rows of W; kParts is 1, or 2 for 4-bit codes
//
// and 64 bytes between steps: a row writes one line in each, and at a distance of 2,048 bytes they would share two sets
// of the level 1 cache (measured: 1.9 ns a line, and 1.1 so).
//
// A row is a mask bit for every column and the kept values in order, whatever the format: one expand instruction a step.
// 4-bit codes times their scale have up to 14 bits, so bfloat16 holds them exactly as the sum of two parts.
#pragma once
#include <immintrin.h>

#include "decode_i8.h"
#include "rows.h"
#include "scratch.h"
#include "tiles.h"

namespace sparsify { namespace {

constexpr int64_t kStripRows32 = 2 * kTileRows;  // rows that are multiplied together

constexpr int64_t step_bytes(int64_t parts) { return parts * 2 * kTileBytes + 64; }

// Where a row of W stands: its mask bits, 64 columns to a word, and its next value. `values` counts elements for 8 and
// 16 bits, half bytes for 4.
struct ExpandRow {
  const uint64_t* words;
  const uint8_t* values;
  int64_t next;
  const uint16_t* scales;
};

// The mask bits of a 2:4 row from its indices, whose bytes are as many: two positions of 2 bits become 4 bits of mask.
inline void mask_24(const uint8_t* indices, int64_t cols, uint64_t* words) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i nibble = _mm512_set1_epi8(15);
  const auto masks = [&](__m512i codes) SPARSIFY_INLINE {
    const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
    const __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    return _mm512_or_si512(even, _mm512_slli_epi16(odd, 4));
  };
  const int64_t bytes = (cols + 7) / 8;
  uint8_t* to = reinterpret_cast<uint8_t*>(words);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    prefetch(indices + i + kAheadI8);
    _mm512_storeu_si512(to + i, masks(_mm512_loadu_si512(indices + i)));
  }
  if (i < bytes) {
    const __mmask64 valid = (uint64_t(1) << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(to + i, valid, masks(_mm512_maskz_loadu_epi8(valid, indices + i)));
  }
  if (cols % 64) {  // bytes that do not exist, and half a byte behind an odd group
    uint64_t& last = words[cols / 64];
    last &= (uint64_t(1) << (cols % 64)) - 1;
  }
}

// Rows row .. row_last of a weight, at most 32, with their masks; rows that do not exist keep nothing.
template <class Weight>
void begin_rows(const Weight& w, int64_t row, int64_t row_last, uint64_t* words, ExpandRow* rows) {
  const int64_t each = mask_words(w.cols), groups = w.group ? (w.cols + w.group - 1) / w.group : 0;
  for (int64_t i = 0; i < kStripRows32; ++i, words += each) {
    rows[i] = {words, static_cast<const uint8_t*>(w.values), 0, static_cast<const uint16_t*>(w.scales)};
    if (row + i >= row_last) {
      std::memset(words, 0, size_t(each) * 8);
      continue;
    }
    rows[i].scales += w.type == DType::i4 ? (row + i) * groups : 0;
    if constexpr (std::is_same_v<Weight, NmWeight>) {
      rows[i].values += (row + i) * w.value_bytes_per_row();
      if (w.n == 2 && w.m == 4) {
        mask_24(w.indices + (row + i) * w.index_bytes_per_row(), w.cols, words);
        continue;
      }
    } else {
      rows[i].values += w.row_start[row + i] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
    }
    row_mask(w, row + i, words);
  }
}

inline int64_t mean_row_bytes(const NmWeight& w) { return w.value_bytes_per_row(); }
inline int64_t mean_row_bytes(const BitmaskWeight& w) { return stored_bytes(w.type == DType::i4 ? DType::i8 : w.type, w.row_start[w.rows]) / w.rows; }

// Where the values of a weight end.
inline const uint8_t* values_end(const NmWeight& w) {
  return static_cast<const uint8_t*>(w.values) + w.rows * w.value_bytes_per_row();
}
inline const uint8_t* values_end(const BitmaskWeight& w) {
  return static_cast<const uint8_t*>(w.values) + w.row_start[w.rows] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
}

// One step of a row: its mask bits and where its next value is in, 64 bytes out; returns where the value after it is.

struct ExpandBf16 {
  static constexpr int64_t kColumns = 32, kParts = 1, kValueBits = 16;
  const uint8_t* end;

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, int64_t next, int64_t step, char* to) const {
    uint32_t mask;
    std::memcpy(&mask, reinterpret_cast<const char*>(row.words) + step * 4, 4);
    const int64_t kept = __builtin_popcount(mask);
    const uint8_t* from = row.values + next * 2;
    const __m512i values = __builtin_expect(end - from >= 64, 1)
                               ? _mm512_loadu_si512(from)
                               : _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << kept) - 1), from);
    _mm512_store_si512(to, _mm512_maskz_expand_epi16(mask, values));
    return next + kept;
  }
};

struct ExpandI8 {
  static constexpr int64_t kColumns = 64, kParts = 1, kValueBits = 8;
  const uint8_t* end;

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, int64_t next, int64_t step, char* to) const {
    const uint64_t mask = row.words[step];
    const int64_t kept = __builtin_popcountll(mask);
    const uint8_t* from = row.values + next;
    const __m512i values = __builtin_expect(end - from >= 64, 1)
                               ? _mm512_loadu_si512(from)
                               : _mm512_maskz_loadu_epi8(kept == 64 ? ~uint64_t(0) : (uint64_t(1) << kept) - 1, from);
    _mm512_store_si512(to, _mm512_maskz_expand_epi8(mask, values));
    return next + kept;
  }
};

// 4-bit codes. A scale belongs to at least the 32 columns of a step: all 16 products of a code and the scale are made
// once, and looked up.
template <bool chunked>  // the values of 64 columns begin a byte, as in a bitmask
struct ExpandI4 {
  static constexpr int64_t kColumns = 32, kParts = 2, kValueBits = 4;
  const uint8_t* end;
  int group_bits;  // a scale belongs to 2^group_bits columns

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, int64_t next, int64_t step, char* to) const {
    uint32_t mask;
    std::memcpy(&mask, reinterpret_cast<const char*>(row.words) + step * 4, 4);
    const int64_t kept = __builtin_popcount(mask);
    if (chunked && step % 2 == 0) next += next % 2;
    const int64_t odd = next % 2;
    const uint8_t* from = row.values + next / 2;
    const __m256i packed =
        __builtin_expect(end - from >= 32, 1)
            ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
            : _mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << (kept + odd + 1) / 2) - 1), from);
    const __m512i wide = _mm512_cvtepu8_epi16(packed);  // 0 0 h l in each 16 bits; wanted 0 h 0 l
    __m512i codes = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x0f0f), 0xa8);
    if (odd) codes = _mm512_alignr_epi8(_mm512_alignr_epi64(_mm512_setzero_si512(), codes, 2), codes, 1);
    const __m256i here = _mm256_mask_expand_epi8(_mm256_set1_epi8(8), mask, _mm512_castsi512_si256(codes));
    const __m512i code = _mm512_cvtepu8_epi16(here);

    const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512 products = _mm512_mul_ps(numbers, _mm512_set1_ps(_cvtsh_ss(row.scales[step * kColumns >> group_bits])));
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(products);
    const __m512 rest = _mm512_sub_ps(products, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(rest);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(code, _mm512_castsi256_si512(high)));
    _mm512_store_si512(to + 2 * kTileBytes, _mm512_permutexvar_epi16(code, _mm512_castsi256_si512(low)));
    return next + kept;
  }
};

// Steps step .. step + count of 32 rows, written at `a`.
template <class Expand>
void expand_rows(const Expand& expand, ExpandRow* rows, int64_t step, int64_t count, char* a) {
  for (int64_t i = 0; i < kStripRows32; ++i, a += kTileRowBytes) {
    int64_t next = rows[i].next;
    for (int64_t s = 0; s < count; ++s) {
      prefetch(rows[i].values + next * Expand::kValueBits / 8 + kAheadI8);
      next = expand(rows[i], next, step + s, a + s * step_bytes(Expand::kParts));
    }
    rows[i].next = next;
  }
}

// Fetches what 32 rows keep of their next block, a little at a time while something else is done: such short pieces of
// rows far apart are nothing that the hardware would fetch ahead.
class FetchRows {
 public:
  FetchRows(const ExpandRow* rows, int64_t value_bits, int64_t block_bytes)
      : rows_(rows), bits_(value_bits), bytes_(block_bytes), row_(block_bytes ? 0 : kStripRows32) {}

  template <int lines>
  SPARSIFY_INLINE void some() {
    if (row_ == kStripRows32) return;
    const uint8_t* from = rows_[row_].values + rows_[row_].next * bits_ / 8 + at_;
    unrolled<lines>([&](auto i) SPARSIFY_INLINE { prefetch(from + 64 * i); });
    at_ += 64 * lines;
    if (at_ >= bytes_) ++row_, at_ = 0;
  }

 private:
  const ExpandRow* rows_;
  int64_t bits_, bytes_, row_, at_ = 0;
};

}}  // namespace sparsify::
