// The weights as tiles: rows of W whose kept values are put where their columns are, zeros elsewhere.
//
//   step     64 bytes of each row: 32 columns in bfloat16, 64 in 8 bits
//   layout   [step][part][2 tiles][16 rows][64 bytes]          32 rows of W; kParts is 1, or 2 for 4-bit codes
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

// Where a row of W stands: its mask bits, 64 columns to a word, and its next value. `values` counts elements for 8 and
// 16 bits, half bytes for 4.
struct ExpandRow {
  const uint64_t* words;
  const uint8_t* values;
  int64_t next;
  const uint16_t* scales;
};

// The mask bits of 2:4 rows from their indices: two positions of 2 bits become 4 bits of mask.
inline void mask_24(const uint8_t* indices, int64_t cols, uint64_t* words) {
  const __m128i low = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
  const __m128i nibble = _mm_set1_epi8(15);
  const int64_t bytes = (cols + 7) / 8;
  uint8_t* to = reinterpret_cast<uint8_t*>(words);
  for (int64_t i = 0; i < bytes; i += 16) {
    const __mmask16 valid = bytes - i >= 16 ? 0xffff : __mmask16((1 << (bytes - i)) - 1);
    const __m128i codes = _mm_maskz_loadu_epi8(valid, indices + i);
    const __m128i even = _mm_shuffle_epi8(low, _mm_and_si128(codes, nibble));
    const __m128i odd = _mm_shuffle_epi8(low, _mm_and_si128(_mm_srli_epi16(codes, 4), nibble));
    _mm_mask_storeu_epi8(to + i, valid, _mm_or_si128(even, _mm_slli_epi16(odd, 4)));
  }
  if (cols % 64) words[cols / 64] &= (uint64_t(1) << (cols % 64)) - 1;  // an odd group leaves half a byte
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
        if (each) words[each - 1] = 0;
        mask_24(w.indices + (row + i) * w.index_bytes_per_row(), w.cols, words);
        continue;
      }
    } else {
      rows[i].values += w.row_start[row + i] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
    }
    row_mask(w, row + i, words);
  }
}

// Where the values of a weight end.
inline const uint8_t* values_end(const NmWeight& w) {
  return static_cast<const uint8_t*>(w.values) + w.rows * w.value_bytes_per_row();
}
inline const uint8_t* values_end(const BitmaskWeight& w) {
  return static_cast<const uint8_t*>(w.values) + w.row_start[w.rows] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
}

struct ExpandBf16 {
  static constexpr int64_t kColumns = 32, kParts = 1;
  const uint8_t* end;

  // Step `step` of a row, written at `to`.
  void operator()(ExpandRow& row, int64_t step, char* to) const {
    const uint32_t mask = uint32_t(row.words[step / 2] >> (step % 2 * 32));
    const int64_t kept = __builtin_popcount(mask);
    const uint8_t* from = row.values + row.next * 2;
    const __m512i values = end - from >= 64 ? _mm512_loadu_si512(from)
                                            : _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << kept) - 1), from);
    _mm512_store_si512(to, _mm512_maskz_expand_epi16(mask, values));
    row.next += kept;
  }
};

struct ExpandI8 {
  static constexpr int64_t kColumns = 64, kParts = 1;
  const uint8_t* end;

  void operator()(ExpandRow& row, int64_t step, char* to) const {
    const uint64_t mask = row.words[step];
    const int64_t kept = __builtin_popcountll(mask);
    const uint8_t* from = row.values + row.next;
    const __mmask64 valid = kept == 64 ? ~uint64_t(0) : (uint64_t(1) << kept) - 1;
    const __m512i values = end - from >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(valid, from);
    _mm512_store_si512(to, _mm512_maskz_expand_epi8(mask, values));
    row.next += kept;
  }
};

// 4-bit codes. A scale belongs to `group` columns, a multiple of the 32 of a step: all 16 products of a code and the
// scale are made once, and looked up.
template <bool chunked>  // the values of 64 columns begin a byte, as in a bitmask
struct ExpandI4 {
  static constexpr int64_t kColumns = 32, kParts = 2;
  const uint8_t* end;
  int group_bits;  // a scale belongs to 2^group_bits columns

  void operator()(ExpandRow& row, int64_t step, char* to) const {
    const uint32_t mask = uint32_t(row.words[step / 2] >> (step % 2 * 32));
    const int64_t kept = __builtin_popcount(mask), first = row.next % 2;
    if (chunked && step % 2 == 0) row.next += first;
    const int64_t odd = row.next % 2;
    const uint8_t* from = row.values + row.next / 2;
    const __mmask32 bytes = __mmask32((uint64_t(1) << (kept + odd + 1) / 2) - 1);
    const __m256i packed = end - from >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                            : _mm256_maskz_loadu_epi8(bytes, from);
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
    row.next += kept;
  }
};

}}  // namespace sparsify::
