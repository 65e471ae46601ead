// The weights as tiles: rows of W whose kept values are put where their columns are, zeros elsewhere.
//
//   step     64 bytes of each row: 32 columns in bfloat16, 64 in 8 bits
//   layout   [32 rows of W][step][part][64 bytes]          kParts is 1, or 2 for 4-bit codes
//
// and 64 bytes between rows, whose distance would else be a power of two, and all of a tile in two sets of the level 1
// cache. Rows are written from end to end: written tile by tile they spread over so many pages that the hardware loses
// track of the streams that are read.
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

constexpr int64_t kBlockRows = 2 * kTileRows;  // rows that are multiplied together
constexpr int64_t kMostBlockSteps = 128;         // that are expanded before they are multiplied

constexpr int64_t expanded_stride(int64_t steps, int64_t parts) { return steps * parts * kTileRowBytes + 64; }

// Where a row of W stands. `next` counts its values, those of a bitmask in 4 bits with the half bytes between them.
struct ExpandRow {
  const uint8_t* mask;  // a bit for every column; or of 2:4 the indices, whose bytes are as many
  const uint8_t* values;
  const uint16_t* scales;  // of 4-bit codes
  int64_t next;
};

// The mask bits of a 2:4 row from its indices, whose bytes are as many: two positions of 2 bits become 4 bits of mask.
inline void mask_24(const uint8_t* indices, int64_t bytes, uint8_t* to) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i nibble = _mm512_set1_epi8(15);
  const auto masks = [&](__m512i codes) SPARSIFY_INLINE {
    const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
    const __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    return _mm512_or_si512(even, _mm512_slli_epi16(odd, 4));
  };
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) _mm512_storeu_si512(to + i, masks(_mm512_loadu_si512(indices + i)));
  if (i < bytes) {
    const __mmask64 valid = (uint64_t(1) << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(to + i, valid, masks(_mm512_maskz_loadu_epi8(valid, indices + i)));
  }
}

inline bool is_24(const NmWeight& w) { return w.n == 2 && w.m == 4; }
inline bool is_24(const BitmaskWeight&) { return false; }

// The masks of patterns other than 2:4 are made here, `words` to a row.
inline const uint8_t* mask_of(const NmWeight& w, int64_t row, uint64_t* words) {
  if (is_24(w)) return w.indices + row * w.index_bytes_per_row();
  row_mask(w, row, words);
  return reinterpret_cast<const uint8_t*>(words);
}
inline const uint8_t* mask_of(const BitmaskWeight& w, int64_t row, uint64_t*) {
  return w.mask + row * w.mask_bytes_per_row();
}
inline int64_t made_words(const NmWeight& w) { return is_24(w) ? 0 : mask_words(w.cols); }
inline int64_t made_words(const BitmaskWeight&) { return 0; }

inline int64_t first_value(const NmWeight& w, int64_t row) { return row * w.value_bytes_per_row(); }  // in bytes
inline int64_t first_value(const BitmaskWeight& w, int64_t row) {
  return w.row_start[row] * (w.type == DType::i4 ? 1 : int64_t(byte_size(w.type)));
}

// Rows row .. row_last of a weight, then rows that do not exist up to `count`: their mask is null.
template <class Weight>
void begin_rows(const Weight& w, int64_t row, int64_t row_last, uint64_t* words, ExpandRow* rows, int64_t count) {
  const int64_t groups = w.group ? (w.cols + w.group - 1) / w.group : 0;
  for (int64_t i = 0; i < count; ++i, words += made_words(w)) {
    rows[i] = {nullptr, static_cast<const uint8_t*>(w.values), static_cast<const uint16_t*>(w.scales), 0};
    if (row + i >= row_last) continue;
    rows[i].mask = mask_of(w, row + i, words);
    rows[i].values += first_value(w, row + i);
    rows[i].scales += w.type == DType::i4 ? (row + i) * groups : 0;
  }
}

inline int64_t kept_in_all(const NmWeight& w) { return w.rows * w.kept_per_row(); }
inline int64_t kept_in_all(const BitmaskWeight& w) { return w.row_start[w.rows] * (w.type == DType::i4 ? 2 : 1); }

// Where the values of a weight end.
template <class Weight>
const uint8_t* values_end(const Weight& w) { return static_cast<const uint8_t*>(w.values) + first_value(w, w.rows); }

// One step of a row: its mask bits and where its next value is in, 64 bytes out; returns where the value after it is.

struct ExpandBf16 {
  static constexpr int64_t kColumns = 32, kParts = 1, kValueBits = 16;
  const uint8_t* end;

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, const uint8_t* bits, int64_t next, int64_t, char* to) const {
    uint32_t mask;
    std::memcpy(&mask, bits, 4);
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

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, const uint8_t* bits, int64_t next, int64_t, char* to) const {
    const uint64_t mask = load_bits(bits, 8);
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

  SPARSIFY_INLINE int64_t operator()(const ExpandRow& row, const uint8_t* bits, int64_t next, int64_t step, char* to) const {
    uint32_t mask;
    std::memcpy(&mask, bits, 4);
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
    _mm512_store_si512(to + kTileRowBytes, _mm512_permutexvar_epi16(code, _mm512_castsi256_si512(low)));
    return next + kept;
  }
};

// Some steps of some rows: rows stand where the steps begin.
struct BlockOfRows {
  ExpandRow* rows;
  int64_t step, steps, cols;

  int64_t first_byte(int64_t columns) const { return step * columns / 8; }
  int64_t mask_bytes(int64_t columns) const {  // those that exist
    const int64_t last = (step + steps) * columns;
    return ((last < cols ? last : cols) + 7) / 8 - first_byte(columns);
  }
};

// A block of 32 rows is expanded a little at a time, while the processor's tile unit is busy with the block before.
// Meanwhile the block that comes after it is fetched: the hardware does not follow such short pieces of rows.
template <class Expand, bool two_of_four>
class ExpandBlock {
 public:
  // Written to `to`, `stride` bytes a row. Values of the later block begin `skip` further than its rows stand now.
  ExpandBlock(const Expand& expand, const BlockOfRows& block, char* to, int64_t stride, const BlockOfRows& later, int64_t skip)
      : expand_(expand), block_(block), later_(later), to_(to), stride_(stride), skip_(skip), row_(block.steps ? 0 : kBlockRows) {}

  // At most `steps` more steps of rows.
  SPARSIFY_INLINE void some(int64_t steps) {
    while (steps > 0 && row_ < kBlockRows) {
      ExpandRow& row = block_.rows[row_];
      if (done_ == 0) begin_row(row);
      const int64_t run = block_.steps - done_ < steps ? block_.steps - done_ : steps;
      const uint8_t* fetch = fetch_ + (next_ - row.next) * Expand::kValueBits / 8;
      char* to = to_ + row_ * stride_ + done_ * Expand::kParts * kTileRowBytes;
      const int64_t begin = next_;
      int64_t next = begin;
      for (int64_t s = 0; s < run; ++s, to += Expand::kParts * kTileRowBytes) {
        prefetch(fetch + (next - begin) * Expand::kValueBits / 8);
        next = expand_(row, mask_ + (done_ + s) * Expand::kColumns / 8, next, block_.step + done_ + s, to);
      }
      steps -= run;
      done_ += run;
      next_ = next;
      if (done_ < block_.steps) return;
      row.next = next;
      ++row_;
      done_ = 0;
    }
  }
  void rest() { some(kBlockRows * block_.steps); }

 private:
  void begin_row(const ExpandRow& row) {
    const int64_t first = block_.first_byte(Expand::kColumns), bytes = block_.mask_bytes(Expand::kColumns);
    const int64_t all = block_.steps * Expand::kColumns / 8;
    if (!row.mask) {
      std::memset(mask_, 0, size_t(all));
    } else {
      if (two_of_four) mask_24(row.mask + first, bytes, mask_);
      else std::memcpy(mask_, row.mask + first, size_t(bytes));
      std::memset(mask_ + bytes, 0, size_t(all - bytes));
      if (block_.cols % 8 && first + bytes == (block_.cols + 7) / 8)  // an odd group of 2:4 leaves half a byte
        mask_[bytes - 1] &= uint8_t((1 << block_.cols % 8) - 1);
    }
    const ExpandRow& later = later_.rows[row_];
    fetch_ = later.values + (later.next + skip_) * Expand::kValueBits / 8;
    if (later.mask)
      for (int64_t byte = 0; byte < all; byte += 64) prefetch(later.mask + later_.first_byte(Expand::kColumns) + byte);
    next_ = row.next;
  }

  const Expand& expand_;
  const BlockOfRows block_, later_;
  char* const to_;
  const int64_t stride_, skip_;
  const uint8_t* fetch_ = nullptr;
  int64_t row_, done_ = 0, next_ = 0;
  alignas(64) uint8_t mask_[kMostBlockSteps * 8];
};

}}  // namespace sparsify::
