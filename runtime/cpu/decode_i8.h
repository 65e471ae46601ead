// Few tokens, quantised weights, on AVX-512 with VBMI, VBMI2 and VNNI: the columns in the lanes, everything in 8 bits.
//
//   2:4       64 kept codes belong to 128 columns: the 2-bit indices become byte places (one multishift), x is permuted
//             to the weights (one two-register permute), and four products are added to each of 16 sums
//   bitmask   64 columns: the kept codes are expanded to where their columns are, x stays (decode_bits_i4.h: in 4 bits)
//   4 bits    become 8 first; the sums of each step are scaled and added up in float32
//
// x holds codes + 128 (codes_i8.h); what that adds is summed beside and taken off.
#pragma once
#include "codes_i8.h"
#include "rows.h"

namespace sparsify { namespace {

constexpr int64_t kAheadI8 = 4 << 10;  // prefetch distance: past the page, where the hardware's streams stop

// 64 signed codes from 32 bytes.
SPARSIFY_INLINE inline __m512i from_nibbles(__m256i packed) {
  const __m512i wide = _mm512_cvtepu8_epi16(packed);  // 0 0 h l in each 16 bits; wanted 0 h 0 l
  const __m512i codes = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi16(0x0f0f), 0xa8);
  return _mm512_sub_epi8(codes, _mm512_set1_epi8(8));
}

// Sums of a row for T tokens. `i4`: each step has its own scale for every lane.
template <DType type, int T>
struct CodeSums {
  __m512i sum[T], shifted;
  __m512 scaled[T];

  SPARSIFY_INLINE void begin() {
    shifted = _mm512_setzero_si512();
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      sum[t] = _mm512_setzero_si512();
      scaled[t] = _mm512_setzero_ps();
    });
  }
  // x(t): the activations of token t that belong to the 64 weights.
  template <class X>
  SPARSIFY_INLINE void add(__m512i weights, __m512 scale, const X& x) {
    const __m512i shift = _mm512_set1_epi8(int8_t(-128)), zero = _mm512_setzero_si512();
    if constexpr (type == DType::i8) {
      shifted = _mm512_dpbusd_epi32(shifted, shift, weights);
      unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[t] = _mm512_dpbusd_epi32(sum[t], x(t), weights); });
    } else {
      const __m512i own = _mm512_dpbusd_epi32(zero, shift, weights);
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        const __m512i exact = _mm512_sub_epi32(_mm512_dpbusd_epi32(zero, x(t), weights), own);
        scaled[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, scaled[t]);
      });
    }
  }
  SPARSIFY_INLINE float end(int t, float row_scale) const {
    if constexpr (type == DType::i8) return float(_mm512_reduce_add_epi32(_mm512_sub_epi32(sum[t], shifted))) * row_scale;
    return _mm512_reduce_add_ps(scaled[t]);
  }
};

// The scales of 16 lanes, `columns` columns each, from G neighbouring float16.
template <int G>
SPARSIFY_INLINE inline __m512 lane_scales(const uint16_t* at) {
  if constexpr (G == 1) return _mm512_set1_ps(_cvtsh_ss(*at));
  uint64_t halves = 0;
  std::memcpy(&halves, at, G * 2);
  const __m256i lane = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i which = _mm256_srli_epi16(lane, G == 2 ? 3 : 2);
  return _mm512_cvtph_ps(_mm256_permutexvar_epi16(which, _mm256_castsi128_si256(_mm_cvtsi64_si128(int64_t(halves)))));
}

// One row of 2:4, T tokens. G scales to a step of 128 columns (i4).
template <DType type, int G, int T>
void decode_24_row(const NmWeight& w, int64_t row, const uint8_t* x, int64_t stride, const float* steps, float bias,
                   float* y) {
  const int64_t kept = w.kept_per_row();
  const uint8_t* values = static_cast<const uint8_t*>(w.values) + row * w.value_bytes_per_row();
  const uint8_t* indices = w.indices + row * w.index_bytes_per_row();
  const uint16_t* scales = type == DType::i4 ? static_cast<const uint16_t*>(w.scales) + row * ((w.cols + w.group - 1) / w.group) : nullptr;
  const __m512i offsets = _mm512_set1_epi64(0x0e0c0a0806040200), three = _mm512_set1_epi8(3);
  const __m512i start = _mm512_set_epi64(0x7c7c787874747070, 0x6c6c686864646060, 0x5c5c585854545050, 0x4c4c484844444040,
                                         0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000);
  CodeSums<type, T> sums;
  sums.begin();
  const auto step = [&](int64_t k, __m512i weights, __m128i codes, __m512 scale) SPARSIFY_INLINE {
    const __m512i code = _mm512_multishift_epi64_epi8(offsets, _mm512_cvtepu16_epi64(codes));
    const __m512i places = _mm512_ternarylogic_epi32(start, code, three, 0xf8);  // start | (code & 3)
    sums.add(weights, scale, [&](auto t) SPARSIFY_INLINE {
      const uint8_t* at = x + t * stride + k;
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(at), places, _mm512_loadu_si512(at + 64));
    });
  };
  int64_t k = 0;
  for (; k + 128 <= w.cols; k += 128, indices += 16) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
    if constexpr (type == DType::i8) {
      prefetch(values + kAheadI8);
      step(k, _mm512_loadu_si512(values), codes, __m512());
      values += 64;
    } else {
      prefetch(values + kAheadI8);
      step(k, from_nibbles(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))), codes, lane_scales<G>(scales));
      values += 32;
      scales += G;
    }
    if (k % 512 == 0) prefetch(indices + kAheadI8 / 4);
  }
  if (k < w.cols) {
    const int64_t left = kept - k / 2;
    const __mmask64 valid = (uint64_t(1) << left) - 1;
    const __m128i codes = _mm_maskz_loadu_epi8(__mmask16((1 << (left + 3) / 4) - 1), indices);
    if constexpr (type == DType::i8) {
      step(k, _mm512_maskz_loadu_epi8(valid, values), codes, __m512());
    } else {
      uint16_t last[G] = {};
      std::memcpy(last, scales, size_t((w.cols - k + w.group - 1) / w.group) * 2);
      const __m256i nibbles = _mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << (left + 1) / 2) - 1), values);
      step(k, _mm512_maskz_mov_epi8(valid, from_nibbles(nibbles)), codes, lane_scales<G>(last));
    }
  }
  const float row_scale = type == DType::i8 ? static_cast<const float*>(w.scales)[row] : 1.0f;
  for (int t = 0; t < T; ++t) y[t * w.rows + row] = sums.end(t, row_scale) * steps[t] + bias;
}

// 64 columns of a bitmask row: the kept bytes where their columns are, `pruned` elsewhere. Expanded from a register and merging: from memory, and zeroing, it is microcoded on Zen.
SPARSIFY_INLINE inline __m512i expand_bytes(__m512i kept, uint64_t mask, __m512i pruned) {
  asm("" : "+v"(kept), "+v"(pruned));
  return _mm512_mask_expand_epi8(pruned, mask, kept);
}

// One row of a bitmask in 8 bits, T tokens.
template <int T>
void decode_bits_row(const BitmaskWeight& w, int64_t row, const uint8_t* x, int64_t stride, const float* steps, float bias,
                     float* y) {
  const int64_t mask_bytes = w.mask_bytes_per_row();
  const uint8_t* mask = w.mask + row * mask_bytes;
  const uint8_t* values = static_cast<const uint8_t*>(w.values) + w.row_start[row];
  const uint8_t* const end = static_cast<const uint8_t*>(w.values) + w.row_start[w.rows];
  CodeSums<DType::i8, T> sums;
  sums.begin();
  const auto step = [&](int64_t k, uint64_t word, auto whole) SPARSIFY_INLINE {
    const int64_t kept = __builtin_popcountll(word);
    const __mmask64 here = kept == 64 ? ~uint64_t(0) : (uint64_t(1) << kept) - 1;
    const __m512i codes = whole ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi8(here, values);
    const __m512i weights = expand_bytes(codes, word, _mm512_setzero_si512());
    prefetch(values + kAheadI8);
    values += kept;
    sums.add(weights, __m512(), [&](auto t) SPARSIFY_INLINE { return _mm512_loadu_si512(x + t * stride + k); });
  };
  int64_t k = 0;
  for (; k + 64 <= w.cols && end - values >= 64; k += 64) {
    if (k % 512 == 0) prefetch(mask + k / 8 + kAheadI8 / 4);
    step(k, load_bits(mask + k / 8, 8), std::true_type());
  }
  for (; k < w.cols; k += 64)
    step(k, load_bits(mask + k / 8, mask_bytes - k / 8 < 8 ? mask_bytes - k / 8 : 8), std::false_type());
  for (int t = 0; t < T; ++t)
    y[t * w.rows + row] = sums.end(t, static_cast<const float*>(w.scales)[row]) * steps[t] + bias;
}

// Rows row .. row_last for all tokens: decode_row(row, first token, bias, y, count) is called for up to 4 at a time; a row stays in cache from one group of tokens to the next.
template <class DecodeRow>
void decode_i8_rows(int64_t tokens, int64_t rows, const float* bias, float* y, int64_t row,
                    int64_t row_last, const DecodeRow& decode_row) {
  for (; row < row_last; ++row)
    for (int64_t t = 0; t < tokens;) {
      const auto run = [&](auto count) {
        decode_row(row, t, bias ? bias[row] : 0.0f, y + t * rows, count);
        t += count;
      };
      switch (tokens - t) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        case 3: run(std::integral_constant<int, 3>()); break;
        default: run(std::integral_constant<int, 4>()); break;
      }
    }
}

}}  // namespace sparsify::
